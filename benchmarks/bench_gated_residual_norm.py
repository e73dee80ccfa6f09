"""gated_residual_norm, forward and backward: eager PyTorch, torch.compile, ours, in the layers of five models.

python benchmarks/bench_gated_residual_norm.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]
"""

import norms

if __name__ == "__main__":
    norms.bench("gated_residual_norm", __doc__)
