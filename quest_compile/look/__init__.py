"""``quest-compile look``: which pages were read for every token of an answer, as one HTML file."""
