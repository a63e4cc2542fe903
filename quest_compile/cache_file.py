"""The file of a cache: locked, preallocated, tensors mapped from it, and a record of what is saved.

    0           head: magic, version, size of a record slot
    4096        two slots: the valid record with the higher number counts, so that a torn one leaves
                the one before it
    behind them regions: one tensor each, at multiples of a page of memory

A record is written once everything it speaks of is on the disk.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import weakref
import zlib

import torch

from quest_compile.file_region import Region
from quest_compile.locked_file import open_locked

_HEAD = struct.Struct("<16sIQ")
_MAGIC, _VERSION = b"quest_compile kv", 1
# Number of the record, bytes of it, CRC-32 of the number and the bytes.
_RECORD = struct.Struct("<QQI")
_FIRST_SLOT = 4096
_HUGE_PAGE = 2 * 2**20


class CacheFile:
    """Made by :meth:`create` or :meth:`open`; the lock lasts as long as a tensor of the file.

    Until the first record a new file is called ``PATH.unsaved``, and is deleted with this object.
    One that a killed process left behind is taken over.
    """

    def __init__(self, path: str, named: str, fd: int) -> None:
        self.path = path
        self._named, self._fd = named, fd
        # Positions below this belong to the record that counts.
        self.saved_length = 0
        self._slot_size = 0
        self._number = 0
        self._end = 0
        self._close = weakref.finalize(self, _close, fd, named, path, os.getpid())

    @classmethod
    def create(cls, path: str) -> CacheFile:
        """
        Raises:
            FileExistsError: there is something at ``path``.
            BlockingIOError: another cache is being made for it.
            OSError: the folder cannot be written.
        """
        if os.path.lexists(path):
            raise FileExistsError(
                f"path: {path} exists: continue it with OffloadedStaticCache.open, or delete it"
            )
        named = f"{path}.unsaved"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        file = cls(path, named, open_locked(named, flags, "make"))
        os.ftruncate(file._fd, 0)
        return file

    @classmethod
    def open(cls, path: str) -> CacheFile:
        """
        Raises:
            FileNotFoundError: there is none; an unsaved one is none.
            BlockingIOError: a cache is open on it, in this process or another.
            OSError: it cannot be read and written.
            ValueError: it is not the file of a cache.
        """
        file = cls(path, path, open_locked(path, os.O_RDWR | os.O_CLOEXEC, "open"))
        try:
            file._read_head()
        except BaseException:
            file.close()
            raise
        return file

    def _read_head(self) -> None:
        head = os.pread(self._fd, _HEAD.size, 0)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise ValueError(f"path: {self.path} is not the file of a cache")
        _, version, self._slot_size = _HEAD.unpack(head)
        if version != _VERSION:
            raise ValueError(
                f"path: {self.path} has version {version} of the format, this reads {_VERSION}"
            )

    def lay_out(self, record_size: int, nbytes: int) -> None:
        """Before the first region; later calls do nothing.

        Records will have up to ``record_size`` bytes, and regions ``nbytes`` or so together: a full
        disk is found now.

        Raises:
            OSError: the disk is full.
        """
        if self._slot_size:
            return
        slot_size = _aligned(record_size + _RECORD.size, mmap.PAGESIZE)
        end = _FIRST_SLOT + 2 * slot_size
        self._allocate(0, end + nbytes)
        self._slot_size, self._end = slot_size, end
        self._write(0, _HEAD.pack(_MAGIC, _VERSION, slot_size))

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Region:
        """Room for a tensor, on the disk and not only in the length of the file.

        Raises:
            OSError: the disk is full.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        alignment = _HUGE_PAGE if nbytes >= _HUGE_PAGE else mmap.PAGESIZE
        region = Region(_aligned(self._end, alignment), shape, dtype)
        self._end = region.offset + nbytes
        self._allocate(region.offset, nbytes)
        return region

    def _allocate(self, offset: int, nbytes: int) -> None:
        try:
            os.posix_fallocate(self._fd, offset, max(nbytes, 1))
        except OSError as error:
            text = f"{error.strerror}: {self._named} needs {offset + nbytes} bytes"
            raise OSError(error.errno, text) from None

    def map(self, region: Region, *, is_read_here_and_there: bool = False) -> torch.Tensor:
        """The tensor itself: what is written to it is written to the file.

        Raises:
            ValueError: the file is too short.
        """
        size = os.fstat(self._fd).st_size
        if region.offset + region.nbytes > size:
            raise ValueError(
                f"path: {self.path} is truncated: {size} bytes of "
                f"{region.offset + region.nbytes} or more"
            )
        memory = mmap.mmap(self._fd, region.nbytes, offset=region.offset)
        if is_read_here_and_there and 2 * size > os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE:
            # Linux would read ahead, by megabytes on some disks, and push out what is needed.
            memory.madvise(mmap.MADV_RANDOM)
        flat = torch.frombuffer(memory, dtype=region.dtype)
        # Not a view: a cache has a version counter of its own.
        return torch.empty(0, dtype=region.dtype).set_(
            flat.untyped_storage(), 0, region.shape, region.strides
        )

    def flush(self) -> None:
        """Everything that was written, through mappings too, is on the disk afterwards."""
        os.fsync(self._fd)

    def before_write(self, position: int) -> None:
        """To be called before this position is written: a record that speaks of it is withdrawn."""
        if position < self.saved_length:
            self.write_record(b"", 0)

    def write_record(self, data: bytes, saved_length: int) -> None:
        """Atomic: whatever happens, the file has this record or the one before."""
        if len(data) + _RECORD.size > self._slot_size:
            raise ValueError(f"path: a record of {len(data)} bytes does not fit {self.path}")
        number = self._number + 1
        head = _RECORD.pack(number, len(data), _crc(number, data))
        self._write(_FIRST_SLOT + number % 2 * self._slot_size, head + data)
        self.flush()
        self._number, self.saved_length = number, saved_length
        if self._named != self.path:
            self._rename()

    def _rename(self) -> None:
        if os.path.lexists(self.path):
            raise FileExistsError(f"path: {self.path} exists by now: move it away and save again")
        os.rename(self._named, self.path)
        self._named = self.path
        self._close.detach()
        self._close = weakref.finalize(self, _close, self._fd, self.path, self.path, os.getpid())
        folder = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def read_record(self) -> bytes:
        """
        Raises:
            ValueError: there is none that is whole.
        """
        found: tuple[int, bytes] = (0, b"")
        for slot in range(2):
            start = _FIRST_SLOT + slot * self._slot_size
            head = os.pread(self._fd, _RECORD.size, start)
            if len(head) < _RECORD.size:
                continue
            number, size, crc = _RECORD.unpack(head)
            if found[0] < number and size <= self._slot_size - _RECORD.size:
                data = os.pread(self._fd, size, start + _RECORD.size)
                if len(data) == size and crc == _crc(number, data):
                    found = number, data
        self._number, data = found
        if not self._number:
            raise ValueError(f"path: {self.path} is damaged: it has no whole record")
        return data

    def _write(self, offset: int, data: bytes) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            offset, data = offset + written, data[written:]

    def close(self) -> None:
        """The lock is free once no tensor of the file is left."""
        self._close()


def _close(fd: int, named: str, path: str, owner: int) -> None:
    if named != path and os.getpid() == owner and os.path.exists(named):
        os.unlink(named)
    os.close(fd)


def _crc(number: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(number.to_bytes(8, "little")))


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
