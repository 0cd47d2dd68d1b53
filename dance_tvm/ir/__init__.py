"""The compiler's view of Relax: a function as a graph, and the windows of its operators."""
