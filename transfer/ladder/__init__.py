"""The ladder of truth, G0 to G6: what is known of the answer, from a rotated copy to nothing at all."""
