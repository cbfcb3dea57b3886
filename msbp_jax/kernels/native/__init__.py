"""What every call into the C++ extension (`native/` of the source tree) needs."""
