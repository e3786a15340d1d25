"""Feature alignment: pure maths on arrays and core objects; no model, no file, no printing."""
