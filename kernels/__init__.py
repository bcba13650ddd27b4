"""Kernel families: tensors in, tensors out. One file each: formula, twin in plain torch, Triton template, op.

| op, in torch.ops.flashdp                              | gives                                                     |
|-------------------------------------------------------|-----------------------------------------------------------|
| gram_sqnorm(x, gs, bias)                 [B]          | sum_l of |x_b^T g_lb|^2 + bias_l |sum_t g_lbt|^2, by pairs |
| gram_sqnorms(xs, gs, bias)        [layers, B]          | the same of several layers                                 |
| outer_sqnorm(x, g)                       [B]          | |x_b^T g_b|^2, by tiles of the d x p product              |
| outer_store(x, g)               [B, d, p], [B]        | the product in x's dtype, and the norm of what was stored |
| outer_stores(xs, gs, stores) [layers, B, d, p], ..., [layers, B] | the same of several layers                     |
| product_sum(product, weights)            [d, p]       | sum_b w_b product_b                                       |
| product_sums(products, weights, key, streams, std) [d, p], ... | the same of several layers, with noise   |
| clipped_product(x, g, samples, beside, ...) [d, p], [B] | their clipped sum, and norms of what is clipped with it |
| weighted_matmul(x, g, weights)           [d, p]       | sum_b w_b x_b^T g_b                                       |
| weighted_matmuls(xs, gs, weights, key, streams, std) [d, p], ... | the same of several layers, with noise |
| embedding_sqnorm(ids, g)                 [B]          | |gradient of the table|^2 of each sample                  |
| embedding_sum(ids, g, weights, num_embeddings) [V, d] | sum_b w_b (gradient of the table of sample b)             |
| tied_cross(ids, ge, x, gl)               [B]          | <gradient by the embedding, gradient by the tied head>    |
| stored_cross(ids, ge, product)           [B]          | the same, the head's gradients being stored               |
| sketch_sqnorm(x, gs, key, streams, probes) [B]        | an estimate of sum_l of |x_b^T g_lb|^2, from Gaussian probes |
| tied_sketch_sqnorm(ids, ge, x, gl, ...)  [B]          | the same of a table that is embedding and head            |
| hutchpp_sqnorm(x, g, key, streams, probes) [B]        | the same of one product, exact in a small space           |
| add_noise(grad, key, stream, std)        like grad    | grad + std * counter-based standard normal                |
| add_secure_noise(grad, key, stream, std) like grad    | the same by ChaCha20, rounded to a grid                   |
| vector_sqnorms(values)                   [B]          | sum_i |v_ib|^2 of several small v                         |
| vector_sums(values, weights, key, streams, std) [n], ... | sum_b w_b v_b, with noise, of several small v       |
| group_weights(values, norms, ...)       2 x [K, B] | clip weights of several groups, and their squared norms   |

Common rules. x is [B, T, d], g is [B, T, p]: any strides, any size may be 0 or 1. Results are float32, or float64
where an operand is float64 (outer_store's product and both noises keep the dtype of x and grad); they are fresh and
contiguous, and a kernel gives the same bits on every run. Samples do not mix: a NaN of one sample stays in that
sample's row, and a sample of weight 0 is not read at all. CUDA tensors of 16 or 32 bits take the Triton kernel,
everything else the twin (`reference`), which is also the oracle of the tests.

`clip.release_weights_into` and `gaussian.gaussian` are plain functions: the runtime makes the op `clip_factors` of the
first.
`hopper` has kernels in Gluon for three families. `catalogue.FAMILIES` lists the records, `codegen.rendered()` the
sources that this process has built.

Importing this package registers the ops. It does not import Triton; the first launch does.
"""

from flashdp_compile.kernels.catalogue import FAMILIES
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.guard import SLACK

__all__ = ["FAMILIES", "SLACK", "Family"]
