"""`dynamo-profile`: measure a bundle on this machine, keep the profile for planning, and show it."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from ..device.inspection import device_key, optional
from ..device.profile import PROFILES, Profile, cached_path, profiles_folder
from ..errors import DynamoError, OutputError, ProfileError
from ..files import check_writable, write_whole
from ..profiling.measure import FULL, QUICK, Progress, measure
from ..profiling.report import compare_profiles, summary, to_csv
from ..profiling.trials import PROMPTS
from ..registry import can_draft
from .arguments import Parser, add_backend, add_chat, add_version, backend, check_chat, put
from .ending import INTERRUPTED, check_stdout, fail, nobody_reads, open_streams, put_out, say

PROG = "dynamo-profile"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(
        prog=PROG,
        description="Measure what a bundle costs on this machine, and keep it: dynamo-run plans its drafts with it.",
    )
    parser.add_argument(
        "bundle",
        nargs="?",
        help="ONNX file of a bundle, or its folder (default: the model that ships with the package)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="under 30 seconds for a small model, with fewer repetitions"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='prompts to decode with every strategy: one a line, or .jsonl with "prompt" or "text" (default: built in)',
    )
    add_chat(parser)
    parser.add_argument(
        "--plain",
        metavar="BUNDLE",
        help="the same model exported with --heads 0, to compare speeds with (default: this bundle without heads)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the profile")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write its figures, one a line")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page with plots (needs the extra [profile])"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="measure nothing: show profiles side by side, across devices, precisions or versions",
    )
    parser.add_argument("--no-keep", action="store_true", help="do not keep the profile for dynamo-run")
    add_backend(parser)
    add_version(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    open_streams()
    args = build_parser().parse_args(arguments)
    try:
        check_stdout()
        return _compare(args) if args.compare else _profile(args)
    except DynamoError as error:
        return fail(PROG, error)
    except BrokenPipeError:
        return nobody_reads()
    except OSError as error:
        return fail(PROG, error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _compare(args: argparse.Namespace) -> int:
    if args.bundle or args.json or args.csv:
        raise ProfileError(
            "--compare shows profiles that are there: it takes JSON files and --html, no bundle and no --json or --csv"
        )
    if len(args.compare) < 2:
        raise ProfileError("--compare needs two profiles or more")
    profiles, names = [Profile.load(path) for path in args.compare], [path.stem for path in args.compare]
    if args.html:
        _write_page(args.html, profiles, names)
    put_out(f"{compare_profiles(profiles, names)}\n")
    return 0


def _profile(args: argparse.Namespace) -> int:
    running = backend(args)
    prompts = None if args.prompts is None else _read_prompts(Path(args.prompts))
    bundle = load_bundle(args.bundle or DEFAULT_BUNDLE)
    effort = QUICK if args.quick else FULL
    questions = _questions(args, bundle, effort.texts, prompts)
    plain = load_bundle(args.plain) if args.plain else None
    if plain is not None and can_draft(plain):
        raise ProfileError(f"{plain.folder} is not a plain bundle: export one with --heads 0")
    if args.html:
        _write_page(None, [], [])  # before the work begins: is what it needs there?
    for path in (args.json, args.csv, args.html):
        if path is not None and not path.absolute().parent.is_dir():
            raise ProfileError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
        if path is not None:
            check_writable(path)
    # Planning knows devices apart by provider and threads alone.
    keep = not (args.no_keep or args.provider_option or args.graph_optimization != "all")
    if keep:
        try:
            check_writable(profiles_folder() / "profile.json")
        except OutputError as error:
            say(f"{PROG}: note: the profile cannot be kept ({error}): {PROFILES} names another folder")
    with _progress(args.quick) as progress:
        profile = measure(bundle, running, effort=effort, prompts=questions, plain=plain, progress=progress)
    kept = cached_path(device_key(profile.device.provider), bundle, args.threads) if keep else None
    lost = _write_all(
        (args.json, profile.save),
        (args.csv, lambda path: write_whole(path, to_csv(profile))),
        (args.html, lambda path: _write_page(path, [profile], [profile.bundle.name])),
        (kept, profile.save),
    )
    if kept is not None and kept not in lost:
        say(f"{PROG}: kept for dynamo-run in {kept}")
    elif not keep and not args.no_keep:
        say(f"{PROG}: not kept for dynamo-run, as it was measured with settings of its own")
    try:
        put_out(f"{summary(profile)}\n")  # nobody may read it to its end
    finally:
        for reason in lost.values():
            fail(PROG, reason)
    return 1 if lost else 0


def _write_all(*files: tuple[Path | None, Callable[[Path], None]]) -> dict[Path, OutputError]:
    """Write what is to be written; returns why a file is not there, as what was measured is shown all the same."""
    lost = {}
    for path, write in files:
        if path is None:
            continue
        try:
            write(path)
        except OutputError as error:
            lost[path] = error
    return lost


def _write_page(path: Path | None, profiles: Sequence[Profile], names: Sequence[str]) -> None:
    from ..profiling.page import check_extra, page

    if path is None:
        check_extra()
    else:
        write_whole(path, page(profiles, names))


def _questions(
    args: argparse.Namespace, bundle: Bundle, built_in: int | None, prompts: Sequence[str] | None
) -> Sequence[str | Sequence[int]] | None:
    """Return the prompts as the flags want them; None for the built-in ones as they are.

    Raises:
        DynamoError: See `put`.
    """
    check_chat(args)
    if args.chat and prompts is None:
        prompts = PROMPTS[:built_in]
    return None if prompts is None else [put(args, bundle, prompt) for prompt in prompts]


def _read_prompts(path: Path) -> list[str]:
    """Return prompts of a file.

    Raises:
        ProfileError: It cannot be read, or there are none in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in lines if line.strip()]
            lines = [record.get("prompt") or record.get("text") or "" for record in records]
    except (OSError, ValueError, AttributeError) as error:
        raise ProfileError(f"{path} is not a readable file of prompts: {error}") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise ProfileError(f"{path} has no prompts: one a line is wanted, or JSON lines with a field prompt or text")
    return found


@contextlib.contextmanager
def _progress(quick: bool) -> Iterator[Progress]:
    """Yield a progress bar on stderr where tqdm is there and stderr is a terminal, else a line."""
    tqdm = optional("tqdm")
    if tqdm is None:
        say(f"{PROG}: measuring, {'half a minute' if quick else 'two minutes'} or more")
        yield lambda stage, share: None
        return
    with tqdm.tqdm(total=100, disable=None, leave=False, bar_format="{desc:24}|{bar}| {percentage:3.0f} %") as bar:

        def show(stage: str, share: float) -> None:
            bar.set_description_str(stage, refresh=False)
            bar.update(round(share * 100) - bar.n)

        yield show


if __name__ == "__main__":
    sys.exit(main())
