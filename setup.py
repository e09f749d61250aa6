"""Package locations: `detokenizers` is under tools/, the others at the top."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["megaft", "megaft.*", "evaluate_zero_shot", "evaluate_zero_shot.*"]),
        "evaluate_zero_shot.report.templates",
        "detokenizers",
    ],
    package_dir={"detokenizers": "tools/detokenizers"},
    package_data={"evaluate_zero_shot.report": ["published.json"], "evaluate_zero_shot.report.templates": ["*"]},
)
