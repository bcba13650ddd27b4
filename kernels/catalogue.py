"""The explicit list of families. Adding one is a file beside this one, an import and a line here."""

from flashdp_compile.kernels import (
    clipped_product,
    embedding_sqnorm,
    embedding_sum,
    gaussian,
    gram_sqnorm,
    gram_sqnorms,
    group_weights,
    hutchpp_sqnorm,
    outer_sqnorm,
    outer_store,
    outer_stores,
    product_sum,
    product_sums,
    secure_noise,
    sketch_sqnorm,
    stored_cross,
    tied_cross,
    tied_sketch_sqnorm,
    vector_sqnorms,
    vector_sums,
    weighted_matmul,
    weighted_matmuls,
)

FAMILIES = {
    module.FAMILY.name: module.FAMILY
    for module in (
        gram_sqnorm,
        gram_sqnorms,
        outer_sqnorm,
        outer_store,
        outer_stores,
        product_sum,
        product_sums,
        clipped_product,
        weighted_matmul,
        weighted_matmuls,
        embedding_sqnorm,
        embedding_sum,
        tied_cross,
        stored_cross,
        sketch_sqnorm,
        tied_sketch_sqnorm,
        hutchpp_sqnorm,
        gaussian,
        secure_noise,
        vector_sqnorms,
        vector_sums,
        group_weights,
    )
}
