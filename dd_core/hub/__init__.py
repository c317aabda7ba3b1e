"""The published models: where they are, how they come here, and how they become bundles.

registry (names) ─▶ pull (hub → cache) ─▶ checkpoint (file → tensors) ─▶ convert (→ bundle folder)
                      └────────────────── locate (name → folder) ──────────────────┘
"""
