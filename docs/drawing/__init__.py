"""What the diagrams of the docs are drawn with: SVG by hand, which follows the reader's light or dark colours.

No script has to run to show them, so they look the same on the site and in the repository.
"""
