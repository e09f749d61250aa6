"""Probe texts for comparing tokenizers: white space, digits, scripts, emoji, markup."""

from __future__ import annotations

PROBES = (
    "To be, or not to be: that is the question.",
    "To be",
    " leading space, trailing space ",
    "two  spaces, three   spaces,     five",
    "\n\na newline first\r\n\ttabs\t\tand\x0bothers\n",
    "def f(x):\n    if x:\n        return 1\n",
    "1234567890 3.14159 1,000,000 2024-01-31",
    "don't DON'T we'll I'm",
    "naïve café ÅÅ ﬁ Ⅷ ½ ① ß İ",
    "日本語のテキスト 中文 한국어 Русский العربية हिन्दी ไทย",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 \u200b\u00a0\u3000\u00ad",
    'https://example.com/a?b=c&d=%20 <html> {"json": [1, null]} \\frac{1}{2}',
    "aaaaaaaaaa ========== ---------- !!!???...",
    "",
)
"""Texts that seemingly equal tokenizers have been seen to encode differently."""
