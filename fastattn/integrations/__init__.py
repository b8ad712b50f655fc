"""Faces that other libraries' users know, over fastattn's ops. None imports its library before it is used."""

from fastattn.integrations import flash_attn, flop_counter, sdpa, transformers

__all__ = ["flash_attn", "flop_counter", "sdpa", "transformers"]
