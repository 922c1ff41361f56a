"""Shell completion as a script without Python in it: commands, options, configuration keys and their values.

    source <(megatron-rl completion bash)        in ~/.bashrc; for zsh: completion zsh, in ~/.zshrc
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator

from megatron_rl.config.load import known_keys, shown
from megatron_rl.config.resources import CONF_DIR

SCRIPT = """\
# completion of megatron-rl, written by `megatron-rl completion {shell}`
{zsh}_megatron_rl_keys="{keys}"
declare -A _megatron_rl_words=(
{words})
declare -A _megatron_rl_values=(
{values})

_megatron_rl() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" command="" word
    local current="${{line##* }}" before="${{line% *}}"
    for word in ${{before#* }}; do
        [[ -n ${{_megatron_rl_words[$command $word]+x}} ]] || break
        command="$command $word"
    done
    COMPREPLY=()
    if [[ $current == *=* ]]; then
        COMPREPLY=($(compgen -W "${{_megatron_rl_values[${{current%%=*}}]}}" -- "${{current#*=}}"))
        [[ $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${{COMPREPLY[@]/#/${{current%%=*}}=}}")
        return
    fi
    [[ $before == "$line" ]] && return
    COMPREPLY=($(compgen -W "${{_megatron_rl_words[${{command:- }}]}}" -- "$current"))
    [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
    [[ ${{#COMPREPLY[@]}} -gt 0 ]] || COMPREPLY=($(compgen -f -- "$current"))
}}
complete -F _megatron_rl megatron-rl
"""


KEYS = "$_megatron_rl_keys"


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """What the shell sources. shell: bash or zsh."""
    keys = dict(choices())
    values = keys | {"ranks": ["stages"]}
    words = {" " + " ".join(path): own for path, own in commands(parser)}
    zsh = "autoload -U +X compinit && compinit; autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return SCRIPT.format(shell=shell, zsh=zsh, keys=" ".join(f"{key}=" for key in keys), words=_table(words),
                         values=_table(values))


def commands(parser: argparse.ArgumentParser,
             path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """(command and subcommand, the words that may follow it) of every command; KEYS where overrides may be given."""
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words += action.choices
            for name, inner in action.choices.items():
                yield from commands(inner, (*path, name))
        else:
            words += action.option_strings
        if action.dest == "overrides":
            words += [KEYS, *(f"{key}=" for key in parser.get_default("own_keys") or ())]
        elif not action.option_strings and action.choices and not isinstance(action, argparse._SubParsersAction):
            words += action.choices
    yield path, words


def choices() -> Iterator[tuple[str, list[str]]]:
    """(group or configuration key, the values that it can take where they can be listed)."""
    for folder in sorted(path for path in CONF_DIR.iterdir() if path.is_dir()):
        yield folder.name, sorted(path.stem for path in folder.glob("*.yaml"))
    yield from ((key, _values(hint)) for key, hint in known_keys())
    yield "resume", ["true", "false", "auto"]


def _values(hint) -> list[str]:
    if hint is bool:
        return ["true", "false"]
    if hint is type(None):
        return ["null"]
    if typing.get_origin(hint) is typing.Literal:
        return [shown(value) for value in typing.get_args(hint)]
    return [value for inner in typing.get_args(hint) for value in _values(inner)] if _is_union(hint) else []


def _is_union(hint) -> bool:
    return typing.get_origin(hint) in (typing.Union, type(int | str))


def _table(entries: dict[str, list[str]]) -> str:
    """Rows of a bash array; a command's key begins with a space, so that none is empty."""
    return "".join(f'    ["{key}"]="{" ".join(words)}"\n' for key, words in entries.items() if words)
