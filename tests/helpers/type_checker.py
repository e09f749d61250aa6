"""Configuration of the runtime type checker of annotations in tests; an int is accepted as a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
