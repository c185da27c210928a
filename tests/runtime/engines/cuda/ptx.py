"""The kernels as NVRTC compiles them, on the CPU: their PTX becomes C++ above cuda_shim.h.

So what the shim replaces is executed as a GPU would: conversions, operands of tensor cores, shuffles, mathematical
functions. An address that is not aligned aborts; with PTX_RACES set, so does a data race. What ptxas makes of PTX,
registers and schedules, is not executed.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from bar_edge.runtime.engines.cuda.compiler import listing

from .host import HostKernels, compile_library

SM = 90
_HEADER = Path(__file__).with_name("ptx.h")
_FLAGS = ("-O0", "-march=native", "-fwrapv", "-w")  # native: float16 in hardware
_TYPES = {
    "pred": "bool", "b8": "uint8_t", "u8": "uint8_t", "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t",
    "f16": "uint16_t", "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "f32": "float", "f16x2": "uint32_t",
    "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t",
}  # fmt: skip
_GARBAGE = {"pred": "true", "b16": "0x5a5a", "b32": "0x5a5a5a5a", "b64": "0x5a5a5a5a5a5a5a5a", "f32": "-7.7e33f"}
_SPECIAL = {"%tid.x": "threadIdx.x", "%ctaid.x": "blockIdx.x", "%ntid.x": "blockDim.x", "%nctaid.x": "gridDim.x"}
_SPACES = {"shared": "SHARED", "local": "OWN", "param": "OWN"}
_STATEMENTS = {"ret": "return;", "bra": "goto {0};", "bra.uni": "goto {0};", "bar.sync": "ptx::barrier({0});"}
# What an instruction's first operand becomes, by opcode, or by opcode without the type of the others.
_EXPRESSIONS = {
    "mov": "{0}", "cvta.to.global": "{0}", "selp": "{2} ? {0} : {1}", "add": "{0} + {1}", "sub": "{0} - {1}",
    "mul.lo": "{0} * {1}", "mul.wide": "ptx::wide({0}) * {1}", "mul.hi": "ptx::high_half({0}, {1})",
    "mad.lo": "{0} * {1} + {2}", "div": "{0} / {1}", "rem": "{0} % {1}", "neg": "-{0}", "abs.f32": "std::fabs({0})",
    "min": "ptx::smaller({0}, {1})", "max": "ptx::larger({0}, {1})", "copysign": "std::copysign({1}, {0})",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "ptx::inverted({0})", "clz.b32": "__clz({0})",
    "shl": "ptx::shift_left({0}, {1})", "shr": "ptx::shift_right({0}, {1})", "prmt.b32": "__byte_perm({0}, {1}, {2})",
    "bfi.b32": "ptx::bit_field({0}, {1}, {2}, {3})", "add.rn": "{0} + {1}", "sub.rn": "{0} - {1}",
    "mul.rn": "{0} * {1}", "div.rn": "{0} / {1}", "rcp.rn": "1 / {0}", "sqrt.rn": "std::sqrt({0})",
    "fma.rn": "std::fma({0}, {1}, {2})",
    "fma.rm": "ptx::fma_rounded_down({0}, {1}, {2})", "ex2.approx.ftz": "ptx::flushed(std::exp2(ptx::flushed({0})))",
    "sub.rn.f16x2": "subtract_halves({0}, {1})", "mul.rn.f16x2": "multiply_halves({0}, {1})",
    "setp.eq": "{0} == {1}", "setp.ne": "{0} < {1} || {0} > {1}", "setp.lt": "{0} < {1}", "setp.le": "{0} <= {1}",
    "setp.gt": "{0} > {1}", "setp.ge": "{0} >= {1}", "setp.neu": "{0} != {1}", "setp.ltu": "!({0} >= {1})",
    "setp.leu": "!({0} > {1})", "cvt.u16": "{0}", "cvt.u32": "{0}", "cvt.u64": "{0}", "cvt.s64": "{0}",
    "cvt.f32.f16": "half_to_float({0})", "cvt.rn.f16.f32": "float_to_half({0})", "cvt.rn.f32.s32": "float({0})",
    "cvt.rn.f32.u32": "float({0})", "cvt.rn.f32.u16": "float({0})", "cvt.rni.f32.f32": "std::rint({0})",
    "cvt.rzi.f32.f32": "std::trunc({0})", "cvt.sat.f32.f32": "ptx::within_0_and_1({0})",
    "cvt.rzi.s32.f32": "ptx::saturated<int32_t>({0})", "cvt.rzi.u64.f32": "ptx::saturated<uint64_t>({0})",
    "shfl.sync.bfly": "ptx::shuffled({0}, {1}, {2}, {3})",
}  # fmt: skip
_MMA = re.compile(r"mma\.sync\.aligned\.(m16n8k16\.row\.col\.f32\.f16\.f16|m16n8k32\.row\.col\.s32\.s8\.s8)\.[fs]32")
_COOPERATION = re.compile(r"\.sync\b")


def build(source: Path, folder: Path, host: HostKernels) -> Path:
    """Make a shared library as `host.build` does, of a .cu file's PTX. `host` knows the parameters of its kernels.

    Takes a minute. Raises EngineError where there is no NVRTC, NotImplementedError for an instruction that no kernel
    had before.
    """
    text = re.sub(r"//[^\n]*", "", listing(source, SM)[0]) + "\n"
    shared, size = _shared_memory(text)
    code = [f'constexpr unsigned SHARED_BYTES = {size};\n#include "{_HEADER}"\n']
    for name, parameters, body in re.findall(r"\.entry (\w+)\((.*?)\)[^{]*\{(.*?)\n\}\n", text, re.DOTALL):
        kernel = _Kernel(re.findall(r"\w+_param_\d+", parameters), shared)
        instructions = "\n".join(kernel.translated(body))
        run = "cooperative" if _COOPERATION.search(body) else "plain"
        code.append(f"""
static void {name}(void** arguments) {{
ptx::begin_thread();
{instructions}
}}
extern "C" void launch_{name}(unsigned grid, unsigned block, void** arguments) {{
    ptx::begin_launch("{name}");
    shim::run_{run}([=] {{ {name}(arguments); }}, grid, block);
}}
extern "C" const char* parameters_{name}() {{ return "{" ".join(host.parameters(name))}"; }}
""")
    return compile_library("".join(code), folder / f"{source.stem}.ptx.so", _FLAGS)


def _shared_memory(text: str) -> tuple[dict[str, int], int]:
    """The address of every `.shared` variable, and the bytes of all of them."""
    addresses, end = {}, 0
    for alignment, name, size in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
        addresses[name] = -(-end // int(alignment)) * int(alignment)
        end = addresses[name] + int(size)
    return addresses, end


class _Kernel:
    """One kernel. Its registers are variables, named as in PTX but for the `%`."""

    def __init__(self, parameters: list[str], shared: dict[str, int]) -> None:
        self._parameters, self._shared = parameters, shared

    def translated(self, body: str) -> Iterator[str]:
        for kind, prefix, number in re.findall(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", body):
            for i in range(1, int(number)):
                yield f"{_TYPES[kind]} {prefix}{i} = {_GARBAGE[kind]};"
        for name, size in re.findall(r"\.local \.align \d+ \.b8\s+(\w+)\[(\d+)\];", body):
            yield f"alignas(16) char {name}[{size}]; uint64_t SPL;"
        body = re.sub(r"^\s*(\.[^;]*;|[{}]\s*$)", "", body, flags=re.MULTILINE)  # directives, and scopes of `asm`
        for statement in re.sub(r"^\$(\w+):", r"\1: ;", body, flags=re.MULTILINE).split(";"):
            words = " ".join(statement.split())
            if words.endswith(":"):
                yield f"{words};"
            elif words:
                condition, instruction = re.fullmatch(r"(?:@(!?%\w+) )?(.*)", words).groups()
                guard = f"if ({condition.replace('%', '')}) " if condition else ""
                yield f"{guard}{{ {self._instruction(instruction)} }}"

    def _instruction(self, words: str) -> str:
        opcode, _, rest = words.partition(" ")
        operands = [operand.strip() for operand in re.findall(r"\{[^}]*\}|[^,\s][^,]*", rest)]
        untyped, _, kind = opcode.rpartition(".")
        if opcode in _STATEMENTS:
            return _STATEMENTS[opcode].format(*(operand.strip("$") for operand in operands))
        if opcode.startswith(("ld.", "st.")):
            return self._access(opcode, kind, operands)
        if _MMA.fullmatch(opcode):
            return self._mma(kind, operands)
        expression = _EXPRESSIONS.get(opcode) or _EXPRESSIONS.get(untyped)
        if expression is None:
            raise NotImplementedError(f"{words}: tell tests/runtime/engines/cuda/ptx.py what it does")
        target, *values = operands
        value = expression.format(*(self._value(v, kind) for v in values))
        if target.startswith("{"):
            first, second = (register if register != "_" else "std::ignore" for register in _parts(target))
            return f"std::tie({_register(first)}, {_register(second)}) = ptx::halves({value});"
        return f"ptx::set({_register(target)}, {value});"

    def _access(self, opcode: str, kind: str, operands: list[str]) -> str:
        place, values = operands if opcode.startswith("st.") else reversed(operands)
        base, offset = re.fullmatch(r"\[([^+]+)\+?(.*)\]", place).groups()
        if opcode.startswith("ld.param."):
            address = f"(uint64_t)arguments[{self._parameters.index(base)}]"
        else:
            address = f"{self._value(base, 'u64')} + {offset or 0}"
        what = f"{_TYPES[kind]}, ptx::{_SPACES.get(opcode.split('.')[1], 'GLOBAL')}"
        if opcode.startswith("ld."):
            return f"ptx::load<{what}>({address}, {', '.join(_register(part) for part in _parts(values))});"
        return f"ptx::store<{what}>({address}, {', '.join(self._value(part, kind) for part in _parts(values))});"

    def _mma(self, kind: str, operands: list[str]) -> str:
        d, a, b, c = map(_parts, operands)

        def array(name: str, kind: str, parts: list[str]) -> str:
            return f"{_TYPES[kind]} {name}[] = {{{', '.join(self._value(part, kind) for part in parts)}}}; "

        results = "".join(f" ptx::set({_register(part)}, sum[{i}]);" for i, part in enumerate(d))
        return f"{array('sum', kind, c)}{array('a', 'u32', a)}{array('b', 'u32', b)}mma(sum, a, b);{results}"

    def _value(self, operand: str, kind: str) -> str:
        """C++ for an operand, read as that type."""
        if operand in self._shared:
            return str(self._shared[operand])
        if operand.startswith("{"):
            first, second = map(_register, _parts(operand))
            return f"({_TYPES[kind]}({second}) << 4 * sizeof({_TYPES[kind]}) | {first})"
        if operand.startswith("0f"):
            return f"std::bit_cast<float>(0x{operand[2:]})"
        if re.match(r"-?\d", operand):
            return f"{_TYPES[kind]}({operand})"
        if operand.startswith("__local"):
            return f"uint64_t({operand})"
        register = _SPECIAL.get(operand) or _register(operand)
        return register if re.match(r"%p\d", operand) else f"ptx::as<{_TYPES[kind]}>({register})"


def _register(operand: str) -> str:
    """A register's variable; of `%r1|%p1` the first."""
    return operand.split("|")[0].lstrip("%")


def _parts(operand: str) -> list[str]:
    """The operands of a vector, or the only one."""
    return [part.strip() for part in operand.strip("{}").split(",")]
