"""The pictures of the report, each drawn for three widths of the page."""
