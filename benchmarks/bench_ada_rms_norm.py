"""ada_rms_norm, forward and backward: eager PyTorch, torch.compile, ours and, on a GPU, Liger.

python benchmarks/bench_ada_rms_norm.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest
"""

import norms


def main(arguments=None):
    norms.run("ada_rms_norm", __doc__, arguments)


if __name__ == "__main__":
    main()
