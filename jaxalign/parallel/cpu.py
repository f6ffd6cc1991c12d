"""Compiler options for CPUs."""

# By default XLA copies a donated array that is read twice before writing to it;
# an optimizer's averages are such arrays.
COMPILER_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}
