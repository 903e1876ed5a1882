"""Pictures of a report that one understands without the text; needs matplotlib."""

from .drawing import Picture, digest_of, draw, pictures, published

__all__ = ["Picture", "digest_of", "draw", "pictures", "published"]
