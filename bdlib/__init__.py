"""BudgetDraft: sparse-KV speculative decoding, taught from notebooks.

Importing this package is light: it loads neither torch nor transformers nor
matplotlib. Import the module that you need, for example
``from bdlib import assets, corpora``.
"""

__version__ = "0.1.0"
