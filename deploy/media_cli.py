"""`fovea media` and `fovea cache`. Commands import what they need themselves, so that `--help` answers at once."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.options import URL, ApiKey, Url

media = typer.Typer(help="Images that are sent once and then named.", no_args_is_help=True)
cache = typer.Typer(help="The embeddings: what is there, warming, purging, moving.", no_args_is_help=True)

MediaId = Annotated[str, typer.Argument(metavar="ID")]


@media.command()
def add(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...")],
    ttl: Annotated[int | None, typer.Option(min=1, help="Seconds until it is forgotten.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Never forget it, nor its embedding.")] = False,
    prewarm: Annotated[bool, typer.Option("--prewarm", help="Encode it now.")] = False,
    url: Url = URL,
    api_key: ApiKey = None,
) -> None:
    """Keep pictures at the service, and print their ids. The same bytes have the same id."""
    from deploy.client import ClientError
    from deploy.media_client import MediaClient, read_file

    fields = {"ttl": str(ttl)} if ttl is not None else {}
    fields |= {name: "true" for name, given in (("pin", pin), ("prewarm", prewarm)) if given}
    with MediaClient(url, api_key) as client:
        for file in files:
            source = read_file(file)
            try:
                added = client.add(source, **fields)
            except ClientError as exc:
                raise ClientError(f"{file}: {exc}") from exc
            print(f"{added['id']}  {added['tokens']} tokens  {file}", flush=True)


@media.command("list")
def list_media(
    url: Url = URL, api_key: ApiKey = None, as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """All pictures that are kept."""
    from deploy.media_client import MediaClient

    with MediaClient(url, api_key) as client:
        found = list(client.media())
    if as_json:
        print(json.dumps(found))
        return
    for one in found:
        print(f"{one['id']}  {_summary(one)}")
    print(f"{len(found)} media, {sum(one['bytes'] for one in found)} bytes")


@media.command()
def show(media_id: MediaId, url: Url = URL, api_key: ApiKey = None) -> None:
    """One picture: its size, tokens, grid, and in which tiers its embedding is now."""
    from deploy.media_client import MediaClient

    with MediaClient(url, api_key) as client:
        found = client.show(media_id)
    for name, value in found.items():
        print(f"{name:8} {json.dumps(value) if isinstance(value, list) else value}")


@media.command()
def rm(
    media_ids: Annotated[list[str], typer.Argument(metavar="ID...")], url: Url = URL, api_key: ApiKey = None
) -> None:
    """Forget pictures and their embeddings, in every tier of every replica."""
    from deploy.media_client import MediaClient

    with MediaClient(url, api_key) as client:
        for media_id in media_ids:
            client.remove(media_id)
            print(f"{media_id} is gone")


@cache.command()
def stats(url: Url = URL, api_key: ApiKey = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Both stores, the tiers of the replica that answers, and its counters."""
    from deploy.media_client import MediaClient

    with MediaClient(url, api_key) as client:
        found = client.stats()
    if as_json:
        print(json.dumps(found))
        return
    for section in ("local", "redis", "media"):
        values: dict[str, Any] = found.get(section) or {}
        print(f"{section:6} " + (", ".join(f"{name} {value}" for name, value in values.items()) or "none"))
    for name, value in sorted(found["counters"].items()):
        print(f"{name} {value:g}")


@cache.command()
def warm(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    ray_data: Annotated[bool, typer.Option("--ray-data", help="As a Ray Data job, for a large folder.")] = False,
    url: Url = URL,
    api_key: ApiKey = None,
) -> None:
    """Encode every picture of a folder that is not cached yet."""
    from deploy import media_client

    started = time.monotonic()
    paths = media_client.pictures(directory)
    warm_all = media_client.warm_by_ray_data if ray_data else media_client.warm
    warmed = warm_all(url, api_key, paths)
    counts = ", ".join(f"{count} {source}" for source, count in sorted(warmed.counts.items()))
    print(f"{len(paths)} pictures in {time.monotonic() - started:.1f} s: {counts or 'none'}")
    for error in warmed.errors:
        print(f"fovea: {error}", file=sys.stderr)
    raise typer.Exit(1 if warmed.errors else 0)


@cache.command()
def purge(url: Url = URL, api_key: ApiKey = None) -> None:
    """Forget every embedding, in every tier of every replica. Media stay, and are encoded again when they are used."""
    from deploy.media_client import MediaClient

    with MediaClient(url, api_key) as client:
        print(f"{client.purge()} embeddings purged")


@cache.command()
def export(file: Path, url: Url = URL, api_key: ApiKey = None) -> None:
    """Write all embeddings into one file."""
    from deploy.media_client import MediaClient

    with MediaClient(url, api_key) as client:
        count = client.export(file)
    print(f"{count} embeddings, {file.stat().st_size} bytes in {file}")


@cache.command("import")
def import_file(file: Path, url: Url = URL, api_key: ApiKey = None) -> None:
    """Read an export. The service checks every embedding, and takes only those of its own model and version."""
    from deploy.media_client import MediaClient, check_export, read_export
    from deploy.progress import track

    count = check_export(file)
    with MediaClient(url, api_key) as client:
        for key, frame in track(read_export(file), "importing", total=count):
            client.import_frame(key, frame)
    print(f"{count} embeddings imported")


def _summary(one: dict[str, Any]) -> str:
    where = "+".join(one["tiers"]) or "not cached"
    until = "pinned" if one["pinned"] else time.strftime("until %F %T", time.localtime(one["expires"]))
    return f"{one['width']} x {one['height']} {one['format']}, {one['tokens']} tokens, {where}, {until}"
