"""`python -m onnxcomp` is the command line."""

from onnxcomp.cli import main

main()
