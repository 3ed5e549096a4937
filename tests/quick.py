"""How the tests compile: most of their programs run for moments and take far longer to compile than
to run.
"""

VARIABLES = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # Of the CPU's compiler: kernels without MLIR, and a program in one piece, as each worker has
    # one core.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
}
"""XLA leaves its costly passes out; `.ci/run` has commands with all of them.

The TPU's compiler ends a process that has these flags.
"""

if __name__ == "__main__":
    print("\n".join(f"export {name}='{value}'" for name, value in VARIABLES.items()))
