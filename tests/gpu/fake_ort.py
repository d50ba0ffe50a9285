"""As much of ONNX Runtime as the operator library calls, so that operators for a GPU run where there is none.

Tensors are addresses with dimensions. Nothing here looks at what lies there, so an address may lead nowhere.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from molae_compress.kernels.compiling import FOLDER

Attribute = int | float | str
OPTIONS, INFO, CONTEXT, ALLOCATOR, MEMORY, DOMAIN = range(0x7001, 0x7007)
FIRST_VALUE = 0x8000
OUTPUT = FIRST_VALUE + 0x100
TABLE_SIZE, WANTED_VERSION = 279, 22
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
_TABLE = (FOLDER / "csrc/ort_abi.h").read_text(encoding="utf-8")
PLACES = {name: int(index) for name, index in re.findall(r"F\((\w+), (\d+)\)", _TABLE)}
FIELDS = re.findall(r"\(\*(\w+)\)\(", _TABLE[_TABLE.index("struct OrtOperator") :])


class COperator(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), *((name, ctypes.c_void_p) for name in FIELDS))


class CBase(ctypes.Structure):
    _fields_ = (("GetApi", ctypes.c_void_p), ("GetVersionString", ctypes.c_void_p))


@dataclass(frozen=True)
class Placed:
    """A tensor: an address, and dimensions."""

    address: int
    dims: tuple[int, ...]


@dataclass
class Run:
    """One call of an operator: what it is given, and what it asks for.

    Attributes:
        inputs: None where one is absent.
        output: address of the output.
        stream: of the call; 0 for none.
        scratch: address that the next piece of memory gets.
        dims: those of the output, once asked for.
        taken: function, memory and bytes of each piece of memory.
        freed: addresses of the pieces that went back.
    """

    inputs: Sequence[Placed | None]
    output: int
    stream: int = 0x55
    scratch: int = 1 << 20
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    dims: tuple[int, ...] | None = None
    taken: list[tuple[str, int, int]] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)


def _text(address: int) -> str:
    return ctypes.string_at(address).decode()


def _write(kind: Callable[..., ctypes._SimpleCData[int] | ctypes._SimpleCData[float]], address: int, value: float) -> int:
    ctypes.memmove(address, ctypes.byref(kind(value)), ctypes.sizeof(kind(value)))
    return 0


def _point(address: int, value: int) -> int:
    return _write(ctypes.c_uint64, address, value)


class FakeRuntime:
    """ONNX Runtime with one operator library registered; a process keeps it for the library's life."""

    def __init__(self, library: Path) -> None:
        self.operators: list[int] = []
        self._statuses: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._run = Run((), 0)
        self._held: list[object] = []
        self._table = (ctypes.c_void_p * TABLE_SIZE)(
            *(self._function(lambda *_, i=index: self._status(1, f"unexpected call of {i}")) for index in range(TABLE_SIZE))
        )
        for name, index in PLACES.items():
            if (mine := getattr(self, f"_do_{name.lower()}", None)) is not None:
                self._table[index] = self._function(mine)
        get_api = self._function(lambda version, *_: ctypes.addressof(self._table) * (version == WANTED_VERSION))
        self._base = CBase(get_api, None)
        register = ctypes.CDLL(str(library)).RegisterCustomOps
        register.restype, register.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_void_p)
        assert register(OPTIONS, ctypes.addressof(self._base)) is None

    def variants(self) -> list[tuple[str, str, int]]:
        """Name, execution provider and element type of every operator, in order of registration."""
        return [
            (
                _text(self._ask(op, "GetName")),
                _text(self._ask(op, "GetExecutionProviderType")),
                self._ask(op, "GetOutputType", 0) & 0xFFFFFFFF,
            )
            for op in self.operators
        ]

    def run(self, variant: tuple[str, str, int], run: Run) -> str | None:
        """Makes a node of a variant, computes it once and destroys it; returns what it says if it refuses."""
        op, self._run = self.operators[self.variants().index(variant)], run
        kernel = ctypes.c_void_p()
        table = ctypes.addressof(self._table)
        if status := self._ask(op, "CreateKernelV2", table, INFO, ctypes.addressof(kernel)):
            return self._message(status)
        status = self._call(op, "KernelComputeV2", kernel.value, CONTEXT)
        self._call(op, "KernelDestroy", kernel.value)
        return self._message(status) if status else None

    def _ask(self, op: int, name: str, *arguments: int | None) -> int:
        return self._call(op, name, op, *arguments)

    def _call(self, op: int, name: str, *arguments: int | None) -> int:
        address = getattr(COperator.from_address(op), name)
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, *(ctypes.c_void_p for _ in arguments))(address)
        return int(function(*arguments) or 0)

    def _function(self, body: Callable[..., int]) -> int:
        # Six integers or pointers at most, all in registers: those that are not passed are not looked at.
        kind = ctypes.CFUNCTYPE(ctypes.c_void_p, *(ctypes.c_void_p for _ in range(6)))
        count = body.__code__.co_argcount - hasattr(body, "__self__")
        made = kind(lambda *arguments: body(*(each or 0 for each in arguments[:count])) or None)
        self._held.append(made)
        return ctypes.cast(made, ctypes.c_void_p).value or 0

    def _status(self, code: int, text: str) -> int:
        held = ctypes.create_string_buffer(text.encode())
        self._statuses[ctypes.addressof(held)] = held
        return ctypes.addressof(held)

    def _message(self, status: int) -> str:
        return self._statuses.pop(status).value.decode()

    def _value(self, handle: int) -> Placed:
        if handle == OUTPUT:
            return Placed(self._run.output, self._run.dims or ())
        found = self._run.inputs[handle - FIRST_VALUE]
        assert found is not None
        return found

    def _take(self, how: str, memory: int, size: int, out: int) -> int:
        self._run.taken.append((how, memory, size))
        return _point(out, self._run.scratch)

    def _attribute(self, name: int, kind: type) -> Attribute | None:
        value = self._run.attributes.get(_text(name))
        return value if isinstance(value, kind) else None

    def _do_createstatus(self, code: int, text: int) -> int:
        return self._status(code, _text(text))

    def _do_geterrormessage(self, status: int) -> int:
        return status

    def _do_releasestatus(self, status: int) -> int:
        del self._statuses[status]
        return 0

    def _do_createcustomopdomain(self, name: int, out: int) -> int:
        assert _text(name) == "molae"
        return _point(out, DOMAIN)

    def _do_customopdomain_add(self, domain: int, op: int) -> int:
        assert domain == DOMAIN
        self.operators.append(op)
        return 0

    def _do_addcustomopdomain(self, options: int, domain: int) -> int:
        assert (options, domain) == (OPTIONS, DOMAIN)
        return 0

    def _do_kernelinfogetattribute_int64(self, info: int, name: int, out: int) -> int:
        value = self._attribute(name, int)
        return self._status(1, "no int") if value is None else _write(ctypes.c_int64, out, int(value))

    def _do_kernelinfogetattribute_float(self, info: int, name: int, out: int) -> int:
        value = self._attribute(name, float)
        return self._status(1, "no float") if value is None else _write(ctypes.c_float, out, float(value))

    def _do_kernelinfogetattribute_string(self, info: int, name: int, out: int, size: int) -> int:
        value = self._attribute(name, str)
        if value is None:
            return self._status(1, "no string")
        text = str(value).encode() + b"\0"
        if out:
            ctypes.memmove(out, text, len(text))
        return _point(size, len(text))

    def _do_kernelinfogetallocator(self, info: int, memory: int, out: int) -> int:
        return _point(out, ALLOCATOR)

    def _do_releaseallocator(self, allocator: int) -> int:
        assert allocator == ALLOCATOR
        return 0

    def _do_kernelcontext_getinputcount(self, context: int, out: int) -> int:
        return _point(out, len(self._run.inputs))

    def _do_kernelcontext_getinput(self, context: int, index: int, out: int) -> int:
        return _point(out, 0 if self._run.inputs[index] is None else FIRST_VALUE + index)

    def _do_kernelcontext_getoutput(self, context: int, index: int, dims: int, count: int, out: int) -> int:
        self._run.dims = tuple((ctypes.c_int64 * count).from_address(dims))
        return _point(out, OUTPUT)

    def _do_gettensortypeandshape(self, value: int, out: int) -> int:
        return _point(out, value)

    def _do_releasetensortypeandshapeinfo(self, info: int) -> int:
        return 0

    def _do_getdimensionscount(self, info: int, out: int) -> int:
        return _point(out, len(self._value(info).dims))

    def _do_getdimensions(self, info: int, out: int, count: int) -> int:
        for place, size in enumerate(self._value(info).dims[:count]):
            _point(out + 8 * place, size)
        return 0

    def _do_gettensormutabledata(self, value: int, out: int) -> int:
        return _point(out, self._value(value).address)

    def _do_kernelcontext_getgpucomputestream(self, context: int, out: int) -> int:
        return _point(out, self._run.stream)

    def _do_allocatorgetinfo(self, allocator: int, out: int) -> int:
        assert allocator == ALLOCATOR
        return _point(out, MEMORY)

    def _do_kernelcontext_getscratchbuffer(self, context: int, memory: int, size: int, out: int) -> int:
        return self._take("scratch", memory, size, out)

    def _do_allocatoralloc(self, allocator: int, size: int, out: int) -> int:
        return self._take("allocator", allocator, size, out)

    def _do_allocatorfree(self, allocator: int, block: int) -> int:
        assert allocator == ALLOCATOR
        self._run.freed.append(block)
        return 0
