"""Update transforms: clipping, compression and the like, between a client and the server."""

from .compression import quantize, quantize_coarsely, random_k, top_k
from .update_transform import (
    Transform,
    UpdateTransform,
    array_transform,
    chain,
    with_error_feedback,
)

__all__ = [
    "Transform",
    "UpdateTransform",
    "array_transform",
    "chain",
    "quantize",
    "quantize_coarsely",
    "random_k",
    "top_k",
    "with_error_feedback",
]
