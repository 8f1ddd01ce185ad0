"""Docstrings as they are written here, made into Markdown: roles become links, ``<g, d>`` stays text."""

import re

import griffe

PUBLIC = "kfqn_optax"
ROLE = re.compile(r":(?:func|class|meth):`~?(\w+)`")
WRAPPED = re.compile(r"^( +(?:\w+, )+\w+,)\n +(?=\w+[,:])", re.MULTILINE)  # names of arguments over two lines
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """For mkdocstrings, which calls it with each object of the package."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        public = set(pkg.members)

        def link(found: re.Match[str]) -> str:
            name = found[1]
            return f"[`{name}`][{PUBLIC}.{name}]" if name in public else f"`{name}`"

        def rewrite(item: griffe.Object | griffe.Alias) -> None:
            if item.docstring is not None:
                text = ROLE.sub(link, item.docstring.value)
                text = WRAPPED.sub(r"\1 ", text)
                text = EXAMPLE.sub(r"\1Examples:", text)
                item.docstring.value = re.sub(r"<(?=\S)", "&lt;", text)
            for member in item.members.values():
                if not member.is_alias:
                    rewrite(member)

        rewrite(pkg)
