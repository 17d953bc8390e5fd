# SPDX-License-Identifier: Apache-2.0
"""Bytes that an instruction moves to and from HBM.

Arrays in VMEM are free. Of an operand that a fusion only slices, the slice counts; of a result that
it updates in place, the update.
"""

from mm1_jax.plan.hlo import VMEM, Computation, Instruction, Module

_SAME_BYTES = ("bitcast", "reshape", "transpose")
_MAX_DEPTH = 5  # of fusions in fusions


def hbm_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
  """Returns the bytes read and written."""
  operands = computation.operands(instruction)
  match instruction.opcode:
    case "dynamic-update-slice":
      return 2 * operands[1].bytes
    case "dynamic-slice" | "slice":
      return 2 * instruction.bytes
    case "broadcast" | "iota":
      return instruction.bytes
  inner = module.computations.get(instruction.called()) if instruction.opcode == "fusion" else None
  total = 0.0
  for position, name in enumerate(instruction.operands):
    operand = computation.by_name.get(name)
    if operand is None or len(operand.shapes) != 1 or operand.shapes[0].memory_space == VMEM:
      continue
    total += _read(module, inner, position, operand.bytes) if inner else operand.bytes
  for position, shape in enumerate(instruction.shapes):
    if shape.memory_space == VMEM:
      continue
    total += _written(module, inner, position, shape.bytes) if inner else shape.bytes
  return total


def _read(module: Module, fused: Computation, position: int, whole: float, depth: int = 0) -> float:
  """Returns the bytes that a fused computation reads of its parameter at `position`."""
  parameter = fused.parameters.get(position)
  if parameter is None or depth > _MAX_DEPTH:
    return whole
  names, total = {parameter.name}, 0.0
  for user in fused:  # in order of use, so a bitcast comes before what uses it
    if names.isdisjoint(user.operands):
      continue
    first = user.operands[0] in names
    match user.opcode:
      case opcode if opcode in _SAME_BYTES:
        names.add(user.name)
      case "dynamic-slice" | "slice" | "gather" if first:
        total += user.bytes
      case "dynamic-slice":  # the index
        pass
      case "dynamic-update-slice" if first:  # in place: what it overwrites is not read
        pass
      case "fusion":
        inner = module.computations[user.called()]
        total += sum(
          _read(module, inner, i, whole, depth + 1)
          for i, name in enumerate(user.operands)
          if name in names
        )
      case "tuple" | "get-tuple-element":
        pass
      case _:
        return whole
  return min(total, whole)


def _written(module: Module, fused: Computation, position: int, whole: float) -> float:
  """Returns the bytes that a fused computation writes of its result at `position`."""
  result = fused.root
  if result.opcode == "tuple":
    result = fused.by_name[result.operands[position]]
  for _ in range(_MAX_DEPTH):
    match result.opcode:
      case "dynamic-update-slice":
        return fused.by_name[result.operands[1]].bytes
      case "bitcast" | "copy" | "reshape" if result.operands:
        result = fused.by_name[result.operands[0]]
      case "fusion":
        fused = module.computations[result.called()]
        result = fused.root
      case _:
        return whole
  return whole
