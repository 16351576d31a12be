"""Everything that has to be shown on a GPU, in one command, and whether the newest results still count.

command.py   python -m benchmarks gpu: the stages, in order, into one JSON that grows with every row
checks.py    is it built, do the GPU tests pass, does compute-sanitizer find nothing
ceilings.py  what the memory gives to a program that only reads, or only copies
foreach.py   how many tensors torch's foreach path takes in one launch
claims.py    the project's promises, from the rows
tables.py    what is printed
sources.py   python -m benchmarks status: the kernels' sources, by their hashes
"""
