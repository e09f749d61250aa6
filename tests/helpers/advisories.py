"""Security advisories of megaft's dependencies, for machines without network: package, first fixed version, name.

For each package, the newest advisory known in November 2026. Packages that parse untrusted files also have minimum
versions, with reasons, in megaft/commands/doctor/floors.py; this table is a second check. Vulnerabilities in code that
megaft never calls are marked.
"""

ADVISORIES = [
    ("aiohttp", "3.14.1", "CVE-2026-54273 to -54280: requests of the hub's clients"),
    ("deepspeed", "0.15.1", "CVE-2024-43497: runs code of whoever reaches its ports"),
    ("filelock", "3.20.3", "CVE-2025-68146, CVE-2026-22701: follows a link put in the lock's place"),
    ("h11", "0.16.0", "CVE-2025-43859: smuggled requests"),
    ("idna", "3.18", "PYSEC-2026-215: a host name that takes minutes"),
    ("jinja2", "3.1.6", "CVE-2025-27516: a chat template leaves its sandbox"),
    ("joblib", "1.2.0", "CVE-2022-21797: eval; not reached, lm-eval's"),
    ("lxml", "6.1.0", "CVE-2026-41066: XML reads other files; not reached, lm-eval's"),
    ("msgpack", "1.2.1", "GHSA-6v7p-g79w-8964; DeepSpeed's"),
    ("nltk", "3.9.3", "CVE-2025-14009: a zip writes elsewhere; not reached, lm-eval's"),
    ("pillow", "12.3.0", "GHSA-9hw9-ch79-4vh6 and nine more: images corrupt memory; not reached, TensorBoard's"),
    ("protobuf", "6.33.5", "CVE-2026-0994: nested messages exhaust the stack"),
    ("pyarrow", "23.0.1", "CVE-2026-25087: an Arrow file corrupts memory; the hub's datasets"),
    ("pygments", "2.20.0", "CVE-2026-4539: slow on made-up text"),
    ("pyyaml", "5.4", "CVE-2020-14343: yaml.load runs code"),
    ("requests", "2.33.0", "CVE-2026-25645"),
    ("scikit-learn", "1.5.0", "CVE-2024-5206; not reached, lm-eval's"),
    ("setuptools", "83.0.0", "GHSA-h35f-9h28-mq5c, GHSA-5rjg-fvgr-3xxf: files written elsewhere while building"),
    ("tqdm", "4.66.3", "CVE-2024-34062: eval of an argument"),
    ("urllib3", "2.7.0", "CVE-2026-44431, CVE-2026-44432, CVE-2026-21441: a small answer fills memory"),
    ("wandb", "0.29.0", "CVE-2026-91771: a downloaded file is written elsewhere; megaft downloads none"),
    ("werkzeug", "3.1.6", "CVE-2026-21860, CVE-2026-27199; TensorBoard's server, which megaft does not start"),
]
