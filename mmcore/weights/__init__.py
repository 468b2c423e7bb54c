"""Weights and settings in the files of other libraries: a system writes two tables, and both directions follow, as
CONTRIBUTING.md shows. Rows of encoders that many models share are in `mmcore.parts.vit_names`, language models in
`mmcore.parts.language_weights`."""
