"""The grid around its cells: arms before, results and claims after."""
