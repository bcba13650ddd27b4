"""A zoo of small training problems, and of models that must be refused; it knows nothing of the implementation.

CASES          name -> Case: what must be exact
REFUSED        name -> Refused: what must be refused (zoo.adversarial)
Case.model(), Case.batch(B), Case.losses(model, batch)   one training problem
LossInside(model, loss, reduction)                       the same with the loss inside the module
"""

from zoo import (  # noqa: F401  (imported for their cases)
    attention,
    convolutions,
    embeddings,
    linears,
    lookalikes,
    norms,
    parameters,
    places,
    plumbing,
    products,
    recurrent,
    refused_axes,
    refused_losses,
    refused_places,
    refused_statistics,
    repeated_constants,
    sharing,
    spectra,
    transformers,
    writes,
)
from zoo.adversarial import REFUSED, Refused
from zoo.case import REGISTRY as CASES, Batch, Case, LossInside, Model, Sizes

__all__ = ["CASES", "REFUSED", "Batch", "Case", "LossInside", "Model", "Refused", "Sizes"]
