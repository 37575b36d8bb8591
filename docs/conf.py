"""How the pages become a site: `make docs`, then open build/docs/index.html."""

project = "ecgscale"
author = "the ecgscale authors"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "ecgscale"
exclude_patterns = ["README.md"]
