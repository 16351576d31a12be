"""Everything that has to be measured on a GPU, in one command.

command.py   python -m benchmarks gpu: the stages, in order, into one JSON that grows with every row; what is printed
ceilings.py  what the memory gives to a program that only reads (reader.py), or only copies
"""
