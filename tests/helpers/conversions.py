"""Conversions between storage formats in one call."""

from megaft.commands.convert import command, config


def run(source, to, format, **settings):
    return command.main(config.ConvertConfig(source=str(source), to=to, format=format, **settings))


def megatron(source, to, size, **settings):
    return run(source, to, "megatron", tensor_parallel_size=size, **settings)
