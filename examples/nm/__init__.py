from typing import Literal

SCORES: dict[Literal["magnitude", "wanda", "ria", "sparsegpt"], Literal["magnitude", "wanda", "ria"]] = {
    "magnitude": "magnitude",
    "wanda": "wanda",
    "ria": "ria",
    "sparsegpt": "wanda",
}
"""Methods, and what a weight is worth when channels are permuted for them."""
