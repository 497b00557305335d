// Functions of bsfa._C that run dense calls which have been prepared (prepared.cpp).
#pragma once

#include <Python.h>

namespace bsfa {

// Adds them to the module; false with a Python error set.
bool add_prepared(PyObject* module);

}  // namespace bsfa
