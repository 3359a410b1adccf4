// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @title What bench/gas.py compares settlement with: the straightforward ways to put a round's rewards on chain.
/// @notice Nobody is authorised and nothing is checked: the least that each way costs.
contract References {
    mapping(uint256 peer => uint256) private _scores;
    mapping(uint256 word => uint256) private _packed;

    /// @notice A slot a peer.
    function storeAll(uint256 first, uint256[] calldata scores) external {
        for (uint256 i = 0; i < scores.length; ++i) {
            _scores[first + i] = scores[i];
        }
    }

    /// @notice Four scores of 64 bits in a slot, packed by the caller.
    function storePacked(uint256 first, uint256[] calldata words) external {
        for (uint256 i = 0; i < words.length; ++i) {
            _packed[first + i] = words[i];
        }
    }

    /// @notice Pay every peer at once, from this contract's tokens.
    function push(IERC20 token, address[] calldata accounts, uint256[] calldata amounts) external {
        for (uint256 i = 0; i < accounts.length; ++i) {
            require(token.transfer(accounts[i], amounts[i]));
        }
    }
}
