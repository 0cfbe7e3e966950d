"""What runs inside a sandbox: a package of its own there, which imports neither drift nor anything slow.

`start.main` plays one of three roles. A *candidate* holds an answer and evaluates calls of its functions. A
*checker*, in another sandbox, runs the dataset's tests with stand-ins for those functions. A *program* is an
answer that reads its input and prints its output.

Only plain data crosses the socket between the first two. The candidate sees neither tests nor expected
values, and the checker builds every value itself, of exact built-in types: whatever an answer defines,
catches, patches or writes, all it can choose is what its functions return.
"""
