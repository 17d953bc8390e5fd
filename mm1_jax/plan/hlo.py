# SPDX-License-Identifier: Apache-2.0
"""Reads the text of an optimized HLO module: computations, instructions, shapes, loops, FLOPs.

Only what pricing a TPU program needs. XLA's own `cost_analysis` counts the body of a loop once and
knows no schedule; the text has both, in the order in which a device runs it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
  "pred": 1,
  "s2": 0.25,
  "u2": 0.25,
  "s4": 0.5,
  "u4": 0.5,
  "f4e2m1fn": 0.5,
  "s8": 1,
  "u8": 1,
  "f8e4m3": 1,
  "f8e4m3fn": 1,
  "f8e4m3fnuz": 1,
  "f8e4m3b11fnuz": 1,
  "f8e5m2": 1,
  "f8e5m2fnuz": 1,
  "s16": 2,
  "u16": 2,
  "f16": 2,
  "bf16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
  "c64": 8,
  "c128": 16,
}
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<= ]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = ")
_END = re.compile(r'\}(, execution_thread="\w+")?$')  # of a computation
_NAME = re.compile(r"%([\w.-]+)")
_PARENTHESIS = re.compile(r"[()]")
VMEM, HOST = 1, 5  # memory spaces, S(n) in a layout; HBM is 0
# Opcodes that pass a value on unchanged, for following it to its source.
_SAME_VALUE = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array's shape: dtype[dims], and the memory that it is in."""

  dtype: str
  dims: tuple[int, ...]
  memory_space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Bytes without the padding that a layout's tiles add."""
    return self.size * _BYTES[self.dtype]


class Instruction:
  """One line: `%name = type opcode(operands), attributes`."""

  def __init__(self, name: str, is_root: bool, rest: str):
    self.name = name
    self.is_root = is_root
    self.type, rest = _split_type(rest)
    self.opcode, _, rest = rest.partition("(")
    end = _closing(rest, 1)
    self.arguments, self.attributes = rest[: end - 1], rest[end:]
    self.operands = _NAME.findall(self.arguments)

  @functools.cached_property
  def shapes(self) -> list[Shape]:
    """The array, or all arrays of a tuple."""
    return [
      Shape(dtype, _dims(dims), _memory_space(layout))
      for dtype, dims, layout in _SHAPE.findall(self.type)
      if dtype in _BYTES
    ]

  @property
  def bytes(self) -> float:
    return sum(shape.bytes for shape in self.shapes)

  def attribute(self, key: str) -> str | None:
    """Returns what follows `key=`, a group in braces or one word."""
    match = re.search(rf"\b{key}=(\{{[^{{}}]*\}}|[^ ,{{]+)", self.attributes)
    return match[1] if match else None

  def called(self, key: str = "calls") -> str:
    """Returns the computation that `key` names, "" if none."""
    match = re.search(rf"\b{key}=\{{?%?([\w.-]+)", self.attributes)
    return match[1] if match else ""

  @property
  def op_name(self) -> str:
    """Where in the traced program it comes from: `jit(train_step)/.../dot_general`."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ""

  @property
  def estimated_cycles(self) -> int:
    """The compiler's own estimate; 0 where it makes none."""
    match = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
    return int(match[1]) if match else 0

  @property
  def custom_call_target(self) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return match[1] if match else ""

  @property
  def index(self) -> int:
    """Of a get-tuple-element."""
    return int(self.attribute("index") or 0)


class Computation:
  """Instructions in the order that they run in."""

  def __init__(self, name: str):
    self.name = name
    self.instructions: list[Instruction] = []
    self.by_name: dict[str, Instruction] = {}

  def add(self, instruction: Instruction) -> None:
    self.instructions.append(instruction)
    self.by_name[instruction.name] = instruction

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions)

  @functools.cached_property
  def root(self) -> Instruction:
    return next((i for i in self.instructions if i.is_root), self.instructions[-1])

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(i.arguments): i for i in self.instructions if i.opcode == "parameter"}

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """Returns the instructions that an instruction reads, in this computation."""
    return [self.by_name[name] for name in instruction.operands if name in self.by_name]


class Module:
  """A parsed program.

  Args:
    text: of an optimized, scheduled module: `jax.stages.Compiled.as_text()`.
  """

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    self.entry = ""
    match = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    self.num_partitions = int(match[1]) if match else 1
    current = None
    for line in _logical_lines(text):
      instruction = _INSTRUCTION.match(line) if current else None
      if instruction and current:
        current.add(Instruction(instruction[2], bool(instruction[1]), line[instruction.end() :]))
      elif _END.match(line):
        current = None
      elif header := _HEADER.match(line):
        current = self.computations[header[2]] = Computation(header[2])
        if header[1]:
          self.entry = header[2]

  @functools.cached_property
  def _flops(self) -> dict[str, float]:
    return {}

  def flops(self, instruction: Instruction, computation: Computation) -> float:
    """Returns 2 x multiply-adds of the matrix products in an instruction and all that it calls."""
    if instruction.opcode in ("fusion", "call", "async-start"):
      name = instruction.called("to_apply" if instruction.opcode == "call" else "calls")
      if name not in self._flops:
        inner = self.computations.get(name, ())
        self._flops[name] = sum(self.flops(i, self.computations[name]) for i in inner)
      return self._flops[name]
    operands = computation.operands(instruction)
    if instruction.opcode == "convolution":
      return convolution_flops(instruction, *(x.shapes[0] for x in operands[:2]))
    if instruction.opcode == "dot":
      contracted = instruction.attribute("lhs_contracting_dims") or "{}"
      dims = operands[0].shapes[0].dims
      return 2.0 * instruction.shapes[0].size * math.prod(dims[d] for d in _dims(contracted[1:-1]))
    return 0.0

  def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
    """Returns how often a while loop runs; None where the text does not tell.

    That is the compiler's `known_trip_count`, or follows from a condition `i < n`, the step that
    the body adds to i, and the value that i starts from.
    """
    known = re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
      return int(known[1])
    condition = self.computations[loop.called("condition")]
    body = self.computations[loop.called("body")]
    start, step, bound = None, None, None
    compare, sides = self._comparison(condition)
    for side in sides:
      if side.opcode == "constant":
        bound = int(side.arguments)
      elif side.opcode == "get-tuple-element":
        step_here = self._step(body, side.index)
        if step_here:
          step, start = step_here, _initial(loop, computation, side.index)
        else:
          bound = _initial(loop, computation, side.index)
    if start is None or step is None or bound is None:
      return None
    inclusive = compare.attribute("direction") in ("LE", "GE")
    return max(0, math.ceil((bound - start) / step) + inclusive)

  def _comparison(self, condition: Computation) -> tuple[Instruction, list[Instruction]]:
    """Returns a condition's compare, and the condition's values that it compares."""
    root = condition.root
    if root.opcode != "fusion":
      return root, [_origin(condition, name) for name in root.operands]
    inner = self.computations[root.called()]
    sides = []
    for name in inner.root.operands:
      side = _origin(inner, name)
      if side.opcode == "parameter":
        side = _origin(condition, root.operands[int(side.arguments)])
      sides.append(side)
    return inner.root, sides

  def _step(self, body: Computation, index: int) -> int | None:
    """Returns what a loop's body adds to element `index` of its state; None if it is not that."""
    if body.root.opcode != "tuple":
      return None
    new, scope = _origin(body, body.root.operands[index]), body
    if new.opcode == "fusion":
      scope = self.computations[new.called()]
      new = scope.root
    if new.opcode not in ("add", "subtract"):
      return None
    constants = [x for name in new.operands if (x := _origin(scope, name)).opcode == "constant"]
    if not constants:
      return None
    return int(constants[0].arguments) * (-1 if new.opcode == "subtract" else 1)


def convolution_flops(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
  """Returns 2 x multiply-adds, leaving out those with padding; a TPU writes dots this way too."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  assert labels, f"a convolution without dim_labels: {instruction.name}"
  in_dims, kernel_dims, out_dims = labels.groups()
  out = instruction.shapes[0]
  window = dict(re.findall(r"(\w+)=([\dx_-]+)", instruction.attribute("window") or ""))
  num = sum(label.isdigit() for label in kernel_dims)

  def each(key: str, default: str) -> list[str]:
    return window[key].split("x") if key in window else [default] * num

  flops = 2.0
  for d in range(num):
    label = str(d)
    flops *= _valid_positions(
      lhs.dims[in_dims.index(label)],
      int(each("size", "1")[d]),
      out.dims[out_dims.index(label)],
      stride=int(each("stride", "1")[d]),
      padding=int(each("pad", "0_0")[d].split("_")[0]),
      lhs_dilation=int(each("lhs_dilate", "1")[d]),
      rhs_dilation=int(each("rhs_dilate", "1")[d]),
    )
  groups = int(instruction.attribute("batch_group_count") or 1)
  batch = lhs.dims[in_dims.index("b")] // groups
  # The kernel's input dim is that of one feature group already.
  return flops * batch * rhs.dims[kernel_dims.index("i")] * out.dims[out_dims.index("f")]


def _valid_positions(
  num_in: int,
  num_kernel: int,
  num_out: int,
  *,
  stride: int,
  padding: int,
  lhs_dilation: int,
  rhs_dilation: int,
) -> int:
  """Returns how many pairs of an output and a kernel position meet a real input, in one dim."""
  if num_kernel == 1 and padding == 0 and stride == lhs_dilation == 1:
    return min(num_in, num_out)
  end = (num_in - 1) * lhs_dilation
  total = 0
  for i in range(num_out):
    first = i * stride - padding
    if lhs_dilation == rhs_dilation == 1:
      total += max(0, min(num_kernel, num_in - first) - max(0, -first))
    else:
      places = (first + k * rhs_dilation for k in range(num_kernel))
      total += sum(0 <= p <= end and p % lhs_dilation == 0 for p in places)
  return total


def _initial(loop: Instruction, computation: Computation, index: int) -> int | None:
  """Returns the constant that a loop's state begins with at `index`."""
  state = computation.by_name[loop.operands[0]]
  if state.opcode != "tuple":
    return None
  value = _origin(computation, state.operands[index])
  return int(value.arguments) if value.opcode == "constant" else None


def _origin(computation: Computation, name: str) -> Instruction:
  """Returns the instruction that a value comes from, through copies."""
  instruction = computation.by_name[name]
  while instruction.opcode in _SAME_VALUE:
    instruction = computation.by_name[instruction.operands[0]]
  return instruction


def _logical_lines(text: str) -> Iterator[str]:
  """Yields lines, with those of an instruction joined: a kernel's attributes span several.

  Such a line may begin with anything; only the next instruction or a computation's end ends one.
  """
  pending: list[str] = []
  for line in text.splitlines():
    begins = _INSTRUCTION.match(line)
    if pending and not begins and not _END.match(line):
      pending.append(line)
      continue
    if pending:
      yield " ".join(pending)
    pending = [line] if begins else []
    if not begins:
      yield line
  if pending:
    yield " ".join(pending)


def _split_type(rest: str) -> tuple[str, str]:
  """Splits `type opcode(...)...` after the type, which has no space unless it is a tuple."""
  end = _closing(rest[1:], 1) + 1 if rest.startswith("(") else rest.index(" ")
  return rest[:end], rest[end:].lstrip()


def _closing(text: str, depth: int) -> int:
  """Returns the place after the parenthesis that closes `depth` open ones."""
  for match in _PARENTHESIS.finditer(text):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.end()
  return len(text)


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(d.replace("<=", "")) for d in text.split(",") if d.strip())


def _memory_space(layout: str) -> int:
  match = re.search(r"S\((\d+)\)", layout)
  return int(match[1]) if match else 0
