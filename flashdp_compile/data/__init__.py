"""Private data as the accounting assumes them: every step draws its samples by chance, independently of the others.

loader = data.private_loader(dataset, sample_rate=0.01, steps=1000, physical_batch_size=64)
for batch in loader:
    ...  # forward and backward; loader.last says that the optimizer's step is due
"""

from flashdp_compile.data.empty import empty_like_batch
from flashdp_compile.data.loader import PrivateLoader, private_loader
from flashdp_compile.data.sampler import MicroBatch, PoissonSampler

__all__ = ["MicroBatch", "PoissonSampler", "PrivateLoader", "empty_like_batch", "private_loader"]
