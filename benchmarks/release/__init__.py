"""What has to hold before a release; nothing is measured here.

bars.py      every promise with its bar, and the claims that a report makes of them
sources.py   python -m benchmarks status: which kernels a GPU result was measured on, by their hashes
checks.py    is it built, do the GPU tests pass, does compute-sanitizer find nothing
"""
