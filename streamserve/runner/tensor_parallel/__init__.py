"""Steps of a model that several processes share: the first leads, the others follow.

    event loop        launch(1)   sample(1)                  launch(2) …
    first rank          [ forward 1        ][ sample 1 ]       [ forward 2
                  plan 1 |        ↕ sums        | ids     plan 2 |
    other ranks         [ forward 1        ][ ids 1    ]       [ forward 2

Every rank has a runner of its own, of the same kind, and the same books. The first one's plans go
to the others as they are, one message each, and all of them run the same steps in the same order.
What was drawn comes from the first rank, from device to device.
"""
