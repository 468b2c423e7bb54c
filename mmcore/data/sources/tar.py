"""webdataset tar shards: names, safe members, and an index by headers alone.

webdataset is imported where a shard is read, and not before: no other source of data needs it.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from tarfile import ReadError, TarFile
from typing import Any, BinaryIO, cast

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.base import parse_image_id
from mmcore.data.sources.captions import CaptionKeys
from mmcore.ops import require

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIX = "txt"
METADATA_SUFFIX = "json"
TXT = CaptionKeys((CAPTION_SUFFIX,), (1.0,))
"""Where captions are unless others are asked for."""
MAX_MEMBER_BYTES = 64 << 20
"""Larger members of a tar are refused unread."""

_REFUSED = "refused-"
DOTS = (
    "by webdataset's rule a key ends at the first dot of a name: rename x.v2.jpg and x.v2.txt to x_v2.jpg and x_v2.txt"
)
_BLOCK = 1 << 16
_HEADER_CUT_OFF = (
    tarfile.EmptyHeaderError,  # pyright: ignore[reportAttributeAccessIssue]
    tarfile.TruncatedHeaderError,  # pyright: ignore[reportAttributeAccessIssue]
)
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)

Sample = dict[str, Any]
"""A group of members with one key: `__key__`, `__url__`, and bytes (or, in an index, places) by lower-case suffix."""
Place = tuple[str, int, int]
"""Where a member's data lies: path of the tar, first byte, length."""


class _StrictTarInfo(tarfile.TarInfo):
    """A header that does not take the end of the file for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Any:
        """The next header; raises ReadError where the file ends before the archive's end mark."""
        try:
            return super().fromtarfile(tarfile)
        except _HEADER_CUT_OFF as error:
            raise ReadError(f"unexpected end of file ({error})") from None


def is_remote(url: str) -> bool:
    """True for what webdataset opens by a scheme of its own ('pipe:...', 's3://...') and not as a path."""
    return url.startswith("pipe:") or "://" in url


def expand_shards(pattern: str, argument: str) -> list[str]:
    """The shards that a brace pattern such as 'a/{000..009}.tar' names; raises ValueError, naming `argument`, where a
    local shard does not exist."""
    from webdataset.shardlists import expand_urls  # noqa: PLC0415 (see above)

    shards = expand_urls(pattern)
    missing = [s for s in shards if not is_remote(s) and not Path(s).is_file()]
    if missing:
        what = f"{argument}={pattern!r} must name existing shards, but {len(missing)} of {len(shards)} are missing"
        raise ValueError(f"data: {what}, the first is {missing[0]}")
    if len(set(shards)) < len(shards):
        raise ValueError(f"data: {argument}={pattern!r} must name each shard once")
    return shards


def shard_samples(urls: Iterator[str]) -> Iterator[Sample]:
    """Undecoded samples of shards in turn; what was refused shows as a suffix 'refused-N' of its sample."""
    from webdataset.tariterators import group_by_keys  # noqa: PLC0415 (see above)

    return group_by_keys(_members(urls))


def pair_bytes(sample: Sample, keys: CaptionKeys = TXT) -> tuple[bytes, list[list[str]]]:
    """Encoded image and captions by key of a sample; raises BrokenRecord where a member was refused or is missing, or
    the caption is empty or not UTF-8."""
    for suffix, reason in sample.items():
        if suffix.startswith(_REFUSED):
            raise BrokenRecord(reason.decode())
    check_members(sample, keys == TXT)
    return image_of(sample), read_texts(sample, keys)


def suffixes_of(keys: CaptionKeys) -> tuple[str, ...]:
    """Of the members that captions are read from."""
    return tuple({key.partition(".")[0]: None for key in keys.keys})


def read_texts(sample: Sample, keys: CaptionKeys) -> list[list[str]]:
    """Captions of a sample's bytes by key: 'txt' is its .txt, 'json.x' what its .json has under x; raises BrokenRecord
    where it has none, or its .json is not an object."""
    if keys == TXT:
        return [[decode_caption(sample[CAPTION_SUFFIX])]]
    values: dict[str, Any] = {}
    if CAPTION_SUFFIX in keys.keys and CAPTION_SUFFIX in sample:
        values[CAPTION_SUFFIX] = decode_caption(sample[CAPTION_SUFFIX])
    wanted = [key for key in keys.keys if key.startswith(f"{METADATA_SUFFIX}.")]
    if wanted and METADATA_SUFFIX in sample:
        metadata = _metadata(sample)
        values |= {key: metadata.get(key.removeprefix(f"{METADATA_SUFFIX}.")) for key in wanted}
    return keys.read(values)


def check_caption_keys(keys: CaptionKeys) -> None:
    """A ValueError unless they are keys of samples."""
    for key in keys.keys:
        holds = key == CAPTION_SUFFIX or (key.startswith(f"{METADATA_SUFFIX}.") and len(key) > 5)
        what = "caption_keys of shards must be txt, or json.x for what a sample's .json has under x, got {!r}"
        require("data", holds, what, key)


def check_members(sample: Sample, needs_text: bool = True) -> None:
    """Raises BrokenRecord without an image or, where it `needs_text`, a .txt; where a name has more than one dot, with
    the rule that makes its suffix longer."""
    for suffixes, what in ((IMAGE_SUFFIXES, "no image"), ((CAPTION_SUFFIX,), "no caption"))[: 1 + needs_text]:
        if not any(suffix in sample for suffix in suffixes):
            raise BrokenRecord(f"{what} ({DOTS})" if has_dotted(sample, suffixes) else what)


def has_dotted(sample: Sample, suffixes: tuple[str, ...] = (*IMAGE_SUFFIXES, CAPTION_SUFFIX)) -> bool:
    """Whether members of a sample would be an image or a caption but for the dots of their names."""
    return any(name.endswith(tuple(f".{suffix}" for suffix in suffixes)) for name in sample)


def image_of(sample: Sample) -> Any:
    """A sample's image, as it has its members; None where it has none."""
    return next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)


def decode_caption(data: bytes) -> str:
    """Caption of UTF-8 bytes, stripped; raises BrokenRecord where it is empty or not UTF-8."""
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BrokenRecord("caption is not UTF-8") from None
    BrokenRecord.unless(bool(caption), "empty caption")
    return caption


def image_identity(sample: Sample) -> str:
    """Which image a sample shows: the "image_id" in its .json, else its shard and key; raises BrokenRecord where the
    .json is no JSON object, or its "image_id" is neither text nor a whole number."""
    return parse_image_id(_metadata(sample).get("image_id")) or f"{sample['__url__']}:{sample['__key__']}"


def _metadata(sample: Sample) -> dict[str, Any]:
    try:
        metadata = json.loads(sample.get(METADATA_SUFFIX, "{}"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise BrokenRecord("metadata is not JSON")
    return metadata


def sample_id(sample: Sample) -> str:
    """Name of a sample: its shard's file name and its key."""
    return f"{sample['__url__'].rsplit('/', 1)[-1]}:{sample['__key__']}"


def _members(urls: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Members of shards in webdataset's form: {fname, data, __url__}, and {} at the end of a shard."""
    from webdataset.gopen import gopen  # noqa: PLC0415 (see above)

    for url in urls:
        complete = False
        with ExitStack() as stack:
            try:
                stream = gopen(url)
                stack.callback(_close_quietly, stream)
                yield from _tar_members(cast(BinaryIO, stream), url)
                # A pipe's command is let come to its end, which tells whether it succeeded.
                while stream.read(_BLOCK):
                    pass
                stream.close()
                complete = True
            except _TAR_ERRORS:
                pass
        if not complete:
            yield {}
            yield {"fname": f"(shard).{_REFUSED}0", "data": b"damaged tar", "__url__": url}
        yield {}


def _close_quietly(stream: Any) -> None:
    with suppress(OSError):
        stream.close()


def _tar_members(stream: BinaryIO, url: str) -> Iterator[dict[str, Any]]:
    """Members of one shard; in place of a refused one stands a member that holds the reason."""
    num_refused = 0
    names: set[str] = set()
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar:
        for member in tar:
            # tarfile keeps every header it has seen, which grows with the shard.
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            is_meta = member.name.startswith("__") and member.name.endswith("__") and "/" not in member.name
            if member.isdir() or is_meta:
                continue
            reason = _refusal(member, names)
            if reason is None:
                file = tar.extractfile(member)
                assert file is not None
                yield {"fname": member.name, "data": file.read(), "__url__": url}
            else:
                num_refused += 1
                key = _split_name(member.name)[0] or "(member)"
                yield {"fname": f"{key}.{_REFUSED}{num_refused}", "data": reason.encode(), "__url__": url}


def _split_name(name: str) -> tuple[str | None, str | None]:
    """A member's key and suffix."""
    from webdataset.tariterators import base_plus_ext  # noqa: PLC0415 (see above)

    return base_plus_ext(name)


def _refusal(member: tarfile.TarInfo, names: set[str]) -> str | None:
    """Why a member is not read, or None; remembers its name in `names`."""
    path = PurePosixPath(member.name)
    if path.is_absolute():
        return "absolute path in tar"
    if ".." in path.parts:
        return "path with .. in tar"
    if member.issym() or member.islnk():
        return "link in tar"
    if not member.isreg():
        return "special file in tar"
    if member.size > MAX_MEMBER_BYTES:
        return "member above the size limit"
    key, suffix = _split_name(member.name)
    if key is None or suffix is None:
        return None
    if suffix.startswith("__"):
        return "reserved suffix in tar"
    if (name := f"{key}.{suffix.lower()}") in names:
        return "duplicate name in tar"
    names.add(name)
    return None


def index_shard(
    shard: str,
    texts: tuple[str, ...] | None = (CAPTION_SUFFIX,),
    purpose: str = " to be held out, or else num_samples be given to train on it",
) -> list[Sample]:
    """The pairs of one local shard, an image and at least one member of `texts`, and what would be one but for the dots
    of its names, or, of None, every sample, by its headers alone: of each member its `Place`; raises ValueError where
    the shard is damaged or compressed."""
    found: dict[str, Sample] = {}
    for name, place in _headers(shard, purpose):
        key, suffix = _split_name(name)
        if key is not None and suffix is not None:
            found.setdefault(key, {"__key__": key, "__url__": shard})[suffix.lower()] = place
    if texts is None:
        return list(found.values())
    return [x for x in found.values() if (image_of(x) and any(t in x for t in texts)) or has_dotted(x)]


def index_images(shard: str) -> dict[str, Place]:
    """Where each image in one local tar lies, by its name; otherwise as `index_shard`."""
    members = ((PurePosixPath(name), place) for name, place in _headers(shard, ""))
    return {str(path): place for path, place in members if path.suffix[1:].lower() in IMAGE_SUFFIXES}


def _headers(shard: str, purpose: str) -> Iterator[tuple[str, Place]]:
    """Name and place of each member of an uncompressed tar that is not refused."""
    names: set[str] = set()
    try:
        with tarfile.open(shard, mode="r:", tarinfo=_StrictTarInfo) as tar:
            for member in tar:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if _refusal(member, names) is None:
                    yield member.name, (shard, member.offset_data, member.size)
    except _TAR_ERRORS as error:
        raise ValueError(f"data: {shard} must be an undamaged, uncompressed tar{purpose}, got: {error}") from None


def read_range(shard: str, offset: int, size: int) -> bytes:
    """`size` bytes of `shard` from `offset`."""
    with Path(shard).open("rb") as file:
        file.seek(offset)
        return file.read(size)
