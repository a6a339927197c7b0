"""From tokens to sums, and from sums to scores."""
