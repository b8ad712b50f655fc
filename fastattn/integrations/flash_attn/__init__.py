"""flash-attn 2 over fastattn's ops, on any device: ``import fastattn.integrations.flash_attn as flash_attn``.

Argument names, layouts, defaults and return values are flash-attn's; ``flash_attn_interface`` lists what differs.
To serve code that imports flash_attn itself, put this module in its place before that code is imported::

    sys.modules["flash_attn"] = fastattn.integrations.flash_attn
    sys.modules["flash_attn.bert_padding"] = fastattn.integrations.flash_attn.bert_padding
"""

from fastattn.integrations.flash_attn import bert_padding
from fastattn.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

# The release whose interface this is; libraries ask for it.
__version__ = "2.8.3"

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
