"""The wiring behind `onnxcomp.api`: passes, targets, data and measurement are brought together here.

`resolve` turns what a caller may give into models, recipes, targets and data; `figures` runs models and measures;
`results` is what the verbs return; the verbs are in the other modules, by what they are for.
"""
