"""How compiled code receives a cluster: one pointer to a table of its arrays.

A tuple of arrays would be passed array by array, some hundred machine words per call between small functions; that
cost more than the simulation itself. So the compiler is taught one type of its own. Its value is the address of a table
``[field, 4]`` of int64: where the data of each array lies, and its shape. Reading ``c.slots`` inside compiled code
builds the array view on the spot, which after optimisation is one load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    NativeValue,
    infer_getattr,
    intrinsic,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)
from numba.np.arrayobj import make_array, populate_array

_WORDS = 4  # address and up to three extents
_INT64 = ir.IntType(64)


class HandleType(types.Type):  # type: ignore[misc]
    """The compiler's type of a tuple of arrays passed by one pointer; ``fields`` are (name, dtype, dimensions)."""

    def __init__(self, name: str, fields: Sequence[tuple[str, np.dtype[Any], int]]) -> None:
        self.fields = tuple((field, types.Array(from_dtype(dtype), ndim, "C")) for field, dtype, ndim in fields)
        super().__init__(name=name)

    def position(self, name: str) -> int:
        return [field for field, _ in self.fields].index(name)


def table(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """The table of a tuple of arrays, which must outlive it: int64 [field, 4]."""
    rows = np.zeros((len(arrays), _WORDS), np.int64)
    for row, array in zip(rows, arrays, strict=True):
        assert array.flags.c_contiguous
        row[0] = array.ctypes.data
        row[1 : 1 + array.ndim] = array.shape
    return rows


def register(handle_type: HandleType, python_class: type) -> Any:
    """Let instances of ``python_class``, whose ``address`` is that of their table, be passed to compiled code.

    Returns the compiled function that makes such a value from an address, for code that walks many of them.
    """
    register_model(HandleType)(_HandleModel)

    @typeof_impl.register(python_class)
    def typeof_handle(value: Any, context: Any) -> HandleType:
        return handle_type

    @intrinsic
    def from_address(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], _INT64.as_pointer())

        return handle_type(types.int64), codegen

    return from_address


class _HandleModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: HandleType) -> None:
        super().__init__(manager, fe_type, _INT64.as_pointer())


@unbox(HandleType)
def _unbox(handle_type: HandleType, value: Any, c: Any) -> NativeValue:
    address = c.pyapi.object_getattr_string(value, "address")
    pointer = c.builder.inttoptr(c.pyapi.long_as_ulonglong(address), _INT64.as_pointer())
    c.pyapi.decref(address)
    return NativeValue(pointer)


@infer_getattr
class _HandleAttributes(AttributeTemplate):  # type: ignore[misc]
    key = HandleType

    def generic_resolve(self, handle_type: HandleType, name: str) -> Any:
        return dict(handle_type.fields).get(name)


@lower_getattr_generic(HandleType)
def _getattr(context: Any, builder: Any, handle_type: HandleType, pointer: Any, name: str) -> Any:
    position = handle_type.position(name)
    array_type = handle_type.fields[position][1]

    def word(offset: int) -> Any:
        return builder.load(builder.gep(pointer, [_INT64(_WORDS * position + offset)]))

    array = make_array(array_type)(context, builder)
    item_bytes = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
    shape = [word(1 + axis) for axis in range(array_type.ndim)]
    strides = [_INT64(item_bytes)]
    for extent in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], extent))
    data = builder.inttoptr(word(0), context.get_value_type(types.CPointer(array_type.dtype)))
    populate_array(
        array,
        data=builder.bitcast(data, array.data.type),
        shape=cgutils.pack_array(builder, shape),
        strides=cgutils.pack_array(builder, strides),
        itemsize=_INT64(item_bytes),
        meminfo=None,
    )
    return array._getvalue()
