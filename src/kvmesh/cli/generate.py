"""`kvmesh generate`: one prompt, its answer streamed to the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kvmesh.cli.render import generation_json, notes, timings_line
from kvmesh.cli.talk import (
    AddressOption,
    JsonOption,
    MaxTokensOption,
    ModelOption,
    RawOption,
    SeedOption,
    TemperatureOption,
    chat_or_text,
    connect,
    read_prompt,
)
from kvmesh.client import Delta, Finish, PromptInfo, Stream
from kvmesh.client.requests import Options
from kvmesh.errors import Unavailable


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    address: AddressOption = None,
    model: ModelOption = None,
    raw: RawOption = False,
    max_tokens: MaxTokensOption = None,
    min_tokens: Annotated[int | None, typer.Option(help="No stop before this many tokens.")] = None,
    temperature: TemperatureOption = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, in (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0 is all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least share of the likeliest token's probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: fewer repetitions.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="In [-2, 2], once per token seen.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="In [-2, 2], per occurrence.")] = None,
    seed: SeedOption = None,
    n: Annotated[int | None, typer.Option("--n", help="Samples of the one prompt.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Draw so many samples, show the --n likeliest.")] = None,
    beams: Annotated[int | None, typer.Option(help="Beam search of this width; shows the --n best.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beam search: above 0 favours longer texts.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="The answer is JSON of this schema: a file, or JSON.")] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches this regular expression.")] = None,
    lark: Annotated[str | None, typer.Option(help="The answer is of this grammar, in Lark's syntax: a file.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities of this many tokens.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for the whole of it.")] = None,
    timings: Annotated[bool, typer.Option("--timings", help="Print what each hop took.")] = False,
    json: JsonOption = False,
) -> None:
    """Generate an answer to PROMPT, token by token."""
    options = given(
        model=model, max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        min_p=min_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, seed=seed, n=n, stop=stop, ignore_eos=ignore_eos or None,
        logprobs=logprobs, best_of=best_of, beam_width=beams, length_penalty=length_penalty,
        json_schema=text_or_file(json_schema), regex=regex, lark=text_or_file(lark),
    )  # fmt: skip
    text = read_prompt(prompt)
    with connect(address) as client:
        plain, chat = chat_or_text(client, text, model, raw)
        with client.generate(plain, chat=chat, timeout=timeout, **options) as stream:
            show = None if json or (n or 1) > 1 else sys.stdout.write
            info, outputs, finish = consume(stream, show)
    if json:
        typer.echo(generation_json(info, outputs, finish))
    elif (n or 1) > 1:
        for output in outputs:
            typer.echo(f"--- sample {output.index}\n{output.text}")
    if timings:
        notes().print(timings_line(finish), style="dim", soft_wrap=True)


def text_or_file(given: str | None) -> str | None:
    """What a file of that name holds; `given` itself if there is none."""
    try:
        return Path(given).read_text() if given and Path(given).is_file() else given
    except OSError:
        return given


def given(**options: Any) -> Options:
    """Only the options that were set: the rest are the router's to choose."""
    return {name: value for name, value in options.items() if value not in (None, [])}  # type: ignore[return-value]


def consume(stream: Stream, show: Any = None) -> tuple[PromptInfo, list[Delta], Finish]:
    """Reads a stream to its end, with each sample's deltas joined; `show` gets the text as it comes.

    Raises:
        Unavailable: the stream ended without saying how.
    """
    prompt, finish = None, None
    outputs: dict[int, Delta] = {}
    for event in stream:
        match event:
            case PromptInfo():
                prompt = event
            case Delta():
                outputs[event.index] = _join(outputs.get(event.index), event)
                if show:
                    show(event.text)
                    sys.stdout.flush()
            case Finish():
                finish = event
    if show:
        show("\n")
    if prompt is None or finish is None:
        raise Unavailable("the router ended the stream early")
    return prompt, [outputs[index] for index in sorted(outputs)], finish


def _join(before: Delta | None, delta: Delta) -> Delta:
    if before is None:
        return delta
    return replace(
        delta,
        text=before.text + delta.text,
        token_ids=before.token_ids + delta.token_ids,
        logprobs=before.logprobs + delta.logprobs,
    )
