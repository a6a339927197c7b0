"""``grasp push``."""

from __future__ import annotations

from typing import Annotated

import typer

from grasp.cli.arguments import CompressedDirectory, Json
from grasp.cli.root import app


@app.command()
def push(
    directory: CompressedDirectory,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository.", show_default=False)],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as private; refuse an existing public one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a compressed checkpoint to the Hugging Face hub. Log in with `hf auth login` first, or set HF_TOKEN.

    A missing repository is created; weights of an earlier upload are replaced. A folder that is incomplete, or has
    pickled files, is refused. If the upload is interrupted, run the same command again: files that the hub already has
    are not sent again.

    [bold]Example[/bold]

    $ grasp push small my-name/SmolLM2-135M-small --private
    """
    from grasp.checkpoint.push import push as upload
    from grasp.checkpoint.push import require_pushable
    from grasp.cli import console
    from grasp.errors import GraspError
    from grasp.files import expanded
    from grasp.reporting.card_figure import add_figure

    directory = expanded(directory)
    require_pushable(directory, repo_id)
    with console.step_bars() as progress:
        try:
            add_figure(directory)
        except GraspError as error:
            progress.note(f"the model card gets no figure: {error}")
        address = upload(directory, repo_id, private=private, progress=progress)
    console.print_result({"repository": address}, lambda _: console.print_line(address), as_json=as_json)
