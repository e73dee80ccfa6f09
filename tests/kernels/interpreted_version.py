"""Run by test_triton_versions.py: prints Triton's version as a script in the interpreter finds it."""

import triton

print(triton.__version__)
print("interpreted: ok")
