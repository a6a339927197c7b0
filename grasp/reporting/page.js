"use strict";
// A heading sorts its table: upwards, then downwards. Blank cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("th")];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const downwards = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", downwards ? "descending" : "ascending");
      const order = (a, b) => {
        const [one, other] = [a.cells[column], b.cells[column]];
        if (!one.textContent || !other.textContent) return !one.textContent - !other.textContent;
        const by = "value" in one.dataset
          ? Number(one.dataset.value) - Number(other.dataset.value)
          : one.textContent.localeCompare(other.textContent, "en", { numeric: true });
        return downwards ? -by : by;
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(order));
    });
  });
}
